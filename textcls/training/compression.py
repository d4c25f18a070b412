"""How prune.py prunes: Trainer.compress() of PaddleNLP 2.8.1, what is wrong in it mended, and the export of each width."""

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any, Callable, Optional, Union

import numpy as np

from textcls.common.errors import is_main_rank
from textcls.common.log import Progress, get_logger, progress_bar
from textcls.data.tokens import TokenizedTexts, model_inputs
from textcls.export.deployment import input_names, input_spec, write_deployment
from textcls.models.checkpoints import Checkpoint
from textcls.models.inference import count_cores, open_pool
from textcls.models.last_layer import compute_all, only_cls
from textcls.models.paddle_setup import PADDLE_3, paddle
from textcls.models.weights import WEIGHTS
from textcls.training.operators import fast_operators
from textcls.training.samplers import LengthGroupedBatchSampler
from textcls.training.trainer import ClassificationTrainer, collate

from paddlenlp.trainer import CompressionArguments, trainer_compress
from paddlenlp.transformers import PretrainedModel, ofa_utils


class AdvancingSampler(LengthGroupedBatchSampler):
    """Moves on to the next epoch by itself, since compress() never says which epoch it is in, and gives no more than
    `steps` batches in all, since compress() takes a step more than --max_steps, or whole epochs; and it says how far it is."""

    steps: int = 0
    progress: Progress

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            if self.steps > 0:
                self.steps -= 1
                self.progress.update(1)
                yield batch
        self.epoch += 1


class PruningTrainer(ClassificationTrainer):
    """The trainer of train.py, with held-out rows that every rank reads as a whole: all then agree what is best.

    checkpoint: of `load_checkpoint`; widths: list of float, 0 to 1; folder: where the results of compress() go, made and
    removed by the caller; train, held_out: TokenizedTexts. trained_model: a copy, since compress() changes the model.
    """

    def __init__(self, checkpoint: Checkpoint, args: CompressionArguments, widths: list[float], folder: str,
                 train: TokenizedTexts, held_out: TokenizedTexts):
        args = copy.copy(args)
        args.output_dir = folder
        self.trains_rows, args.full_embeddings = not args.full_embeddings, True  # rows from within compress() on
        args.width_mult_list = [repr(width) for width in widths]  # compress() evaluates these strings
        super().__init__(checkpoint.labels, checkpoint.rust_tokenizer, args, model=checkpoint.model,
                         criterion=paddle.nn.CrossEntropyLoss(), data_collator=lambda rows: collate(rows, checkpoint.pad_id),
                         train_dataset=train, eval_dataset=held_out.longest_first(), tokenizer=checkpoint.tokenizer)
        batches = len(super()._get_train_sampler())
        self.steps = args.max_steps if args.max_steps > 0 else max(1, int(args.num_train_epochs * batches))
        args.save_steps = min(args.save_steps, self.steps)  # compress() saves nothing in a run that is shorter
        self.trained_model = copy.deepcopy(checkpoint.model)
        self.speed = contextlib.ExitStack()  # what makes the training faster and must not reach the export
        compute_all(checkpoint.model)  # the student learns the teacher's states of all tokens, in the last layer, too
        patch_pruning(self, lambda trainer: export_widths(trainer, checkpoint))
        patch_quantization(self)

    def compress(self, **options: Any) -> None:
        """Prune and quantize as the library does."""
        with self.speed:
            if paddle.get_device() == "cpu" and "dynabert" in self.args.strategy:
                self.speed.enter_context(fast_operators(self.speed.enter_context(open_pool(count_cores()))))
            super().compress(**options)

    def keep_rows(self) -> None:
        """Train only the word embeddings of tokens that occur, until `speed` is closed, and save the whole table all the same."""
        super().keep_rows()
        self.speed.callback(self.restore_rows)
        save = self.model.save_pretrained

        def save_whole(*given: Any, **options: Any) -> None:
            with self.rows.whole() if self.rows is not None else contextlib.nullcontext():
                save(*given, **options)

        object.__setattr__(self.model, "save_pretrained", save_whole)

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        super().create_optimizer_and_scheduler(num_training_steps)
        step = self.optimizer.step

        def shrink_and_step() -> None:  # compress() calls no callbacks
            if self.rows is not None:
                self.rows.shrink(1 - self.optimizer.get_lr() * self.args.weight_decay)
            step()

        self.optimizer.step = shrink_and_step

    def _get_train_sampler(self) -> AdvancingSampler:
        sampler = AdvancingSampler(self.train_dataset, self.args.per_device_train_batch_size, self.args.seed,
                                   self.args.dataset_world_size, self.args.dataset_rank, self.args.dataloader_drop_last)
        sampler.steps = self.steps
        sampler.progress = progress_bar(self.steps, "Training", unit="steps", disable=not is_main_rank())
        return sampler

    def _get_eval_sampler(self, eval_dataset: TokenizedTexts) -> paddle.io.BatchSampler:
        return paddle.io.BatchSampler(eval_dataset, batch_size=self.args.per_device_eval_batch_size)

    def quant(self, model_dir: str, strategy: str) -> None:
        """Quantize, and mend what compress() gets wrong from the second width on: quantization-aware training would go on with
        the narrowest model, in static mode; quantizing embeddings would look for the last width's result."""
        if strategy == "qat":
            paddle.disable_static()
            if model_dir != self.args.output_dir:
                self.model = pruned_model(self, model_dir)
        elif strategy == "embeddings" and os.path.basename(model_dir) == "quant_emb":
            model_dir = os.path.join(os.path.dirname(model_dir), "int8")
        return super().quant(model_dir, strategy)


class TeacherOfRanks(paddle.nn.Layer):
    """Gives the teacher's layers the names that paddle.DataParallel gives the student's."""

    def __init__(self, teacher: paddle.nn.Layer):
        super().__init__()
        self._layers = teacher

    def forward(self, *inputs: paddle.Tensor, **options: Any) -> Any:
        return self._layers(*inputs, **options)


def answer_once(teacher: PretrainedModel, ofa_model: paddle.nn.Layer) -> None:
    """Let the teacher be asked once a batch, not once a width, and keep nothing for gradients that it has not.

    ofa_model: the OFA that asks it, whose Tacts are the states of the teacher's layers.
    """
    forward = teacher.forward
    last: dict[str, Any] = {"ids": None}
    ofa_model.Tacts = {}

    def answer(input_ids: paddle.Tensor, **options: Any) -> paddle.Tensor:
        if last["ids"] is not input_ids:
            with paddle.no_grad():
                output = forward(input_ids, **options)
            last.update(ids=input_ids, output=output, states=dict(ofa_model.Tacts))
        ofa_model.Tacts.update(last["states"])
        return last["output"]

    object.__setattr__(teacher, "forward", answer)


class EmbeddingByPlace(paddle.nn.Embedding):
    """paddle.nn.Embedding with the arguments of Paddle 2 in their places."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: Optional[int] = None, sparse: bool = False,
                 weight_attr: Optional[paddle.ParamAttr] = None, name: Optional[str] = None):
        super().__init__(num_embeddings, embedding_dim, padding_idx=padding_idx, sparse=sparse, weight_attr=weight_attr,
                         name=name)


class LayerNormByPlace(paddle.nn.LayerNorm):
    """paddle.nn.LayerNorm with the arguments of Paddle 2 in their places."""

    def __init__(self, normalized_shape: Union[int, list[int]], epsilon: float = 1e-05,
                 weight_attr: Optional[paddle.ParamAttr] = None, bias_attr: Optional[paddle.ParamAttr] = None,
                 name: Optional[str] = None):
        super().__init__(normalized_shape, epsilon=epsilon, weight_attr=weight_attr, bias_attr=bias_attr, name=name)


def patch_pruning(trainer: PruningTrainer, export_widths: Callable[[PruningTrainer], None]) -> None:
    """Replace, for the rest of this process, what is wrong with pruning in PaddleSlim 2.6.0, PaddleNLP 2.8.1 (trainer_compress)
    and between them and Paddle 2.6.2.

    - PaddleSlim's SuperLayerNorm expects three results of an operator that returns one since Paddle 2.6 ("too many values
      to unpack"). Can go when its forward runs.
    - In several processes the student's layers have other names than the teacher's, and the distillation of layers is
      left out without a word. Can go when OFA's calc_distill_loss is not 0 there.
    - The gradients by which heads and neurons are weighed would be part of the first step's. Can go when none is left before it.
    - The teacher answers anew for each width, with gradients that nobody reads; the student only begins to drop out, and the
      teacher with it, after the first evaluation. Can go when OFA asks an evaluating teacher once a batch.
    - The export applies every width to the model that the widths before have shrunk (12 heads, 9, 6 instead of 8), and
      every rank writes it. Can go when _dynabert_export copies the model.
    - With Paddle 3 PaddleSlim's layers give paddle.nn.Embedding and LayerNorm arguments by place which they only take by name.
      Can go when SuperEmbedding and SuperLayerNorm can be built.
    """
    from paddleslim.nas.ofa.layers import SuperEmbedding, SuperLayerNorm

    begin, weigh, reorder = (trainer_compress._dynabert_init, ofa_utils.compute_neuron_head_importance,
                             ofa_utils.reorder_neuron_head)

    def layer_norm(self: paddle.nn.LayerNorm, hidden: paddle.Tensor) -> paddle.Tensor:
        size = hidden.shape[-1]
        self.cur_config = {"prune_dim": size}
        return paddle.nn.functional.layer_norm(hidden, [size], self.weight[:size], self.bias[:size], self._epsilon)

    def begin_with_names(trainer: PruningTrainer, model: PretrainedModel,
                         loader: paddle.io.DataLoader) -> tuple[paddle.nn.Layer, PretrainedModel]:
        ofa_model, teacher = begin(trainer, model, loader)
        if isinstance(ofa_model.model, paddle.DataParallel):
            layers = ofa_model._mapping_layers  # the list that distill_config holds, too
            layers[:] = [f"_layers.{name}" for name in layers]
            ofa_model.ofa_teacher_model.model = TeacherOfRanks(teacher)
        answer_once(teacher, ofa_model)
        ofa_model.model.train()  # the student drops out, the teacher does not
        return ofa_model, teacher

    def weigh_by_cls(model: PretrainedModel, **options: Any) -> tuple[paddle.Tensor, list[np.ndarray]]:
        with only_cls(model):
            return weigh(model=model, **options)

    def reorder_and_keep_rows(model: PretrainedModel, *importance: Any) -> None:
        reorder(model, *importance)
        model.clear_gradients()
        if trainer.trains_rows:  # here: the teacher has been copied, and paddle.DataParallel does not hold the weights yet
            trainer.keep_rows()

    SuperLayerNorm.forward = layer_norm
    if PADDLE_3:
        SuperEmbedding.__bases__, SuperLayerNorm.__bases__ = (EmbeddingByPlace,), (LayerNormByPlace,)
    trainer_compress._dynabert_init = begin_with_names
    trainer_compress.compute_neuron_head_importance = weigh_by_cls
    trainer_compress.reorder_neuron_head = reorder_and_keep_rows
    trainer_compress._dynabert_export = export_widths


def patch_quantization(trainer: PruningTrainer) -> None:
    """Replace, for the rest of this process, what is wrong with quantization between PaddleNLP 2.8.1 and Paddle 2.6.2.

    It hands over a generator where Paddle takes a DataLoader ("data_loader cannot be None"), and names where it takes variables
    ("'feed_vars' should be a Variable"). Can go when the strategies ptq and embeddings run.
    """
    from paddle.static import quantization

    quantize, save = quantization.PostTrainingQuantization, paddle.static.save_inference_model
    names = input_names(trainer.trained_model)

    def feed(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        return model_inputs(trainer.data_collator(rows)["input_ids"], names)

    def quantize_from_loader(batch_generator: object, batch_size: int, **options: Any) -> quantization.PostTrainingQuantization:
        loader = paddle.io.DataLoader(trainer.eval_dataset, batch_size=batch_size, collate_fn=feed, places=paddle.CPUPlace())
        return quantize(data_loader=loader, batch_size=batch_size, **options)

    def save_variables(prefix: str, feeds: list[Union[str, paddle.static.Variable]], fetches: list[paddle.static.Variable],
                       executor: paddle.static.Executor, program: paddle.static.Program, **options: Any) -> None:
        feeds = [program.global_block().var(feed) if isinstance(feed, str) else feed for feed in feeds]
        return save(prefix, feeds, fetches, executor, program=program, **options)

    trainer_compress.generate_input_spec = lambda *_: input_spec(names)  # as in export/
    quantization.PostTrainingQuantization = quantize_from_loader
    paddle.static.save_inference_model = save_variables


@paddle.no_grad()
def evaluate_held_out(trainer: PruningTrainer, model: paddle.nn.Layer, loader: paddle.io.DataLoader) -> float:
    """Measure how good a model is on the held-out rows, for compress(): accuracy and, between equals, the lower loss.

    The library's own evaluation reuses the first batch's padding mask for all, leaves the teacher with dropout, and
    saves nothing where the accuracy is 0.
    """
    from paddleslim.nas.ofa import OFA

    inner = model.model if isinstance(model, OFA) else model  # OFA would run the teacher, too
    inner = inner._layers if isinstance(inner, paddle.DataParallel) else inner
    # DynaBERT's forward takes a list of two masks, and makes the first itself
    is_elastic = getattr(inner.base_model.forward, "__func__", None) is trainer_compress.auto_model_dynabert_forward
    is_training = inner.training
    inner.eval()
    correct, loss = 0, 0.0
    with only_cls(inner):
        for batch in loader:
            logits = inner(input_ids=batch["input_ids"], attention_mask=[None, None] if is_elastic else None)
            correct += int((logits.argmax(axis=-1) == batch["labels"]).sum())
            loss += float(paddle.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"))
    if is_training:
        inner.train()  # and not the OFA, whose teacher would then drop out
    accuracy, loss = correct / len(trainer.eval_dataset), loss / len(trainer.eval_dataset)
    get_logger().info(f"held-out rows, loss: {loss:.5f}, acc: {accuracy:.5f}")
    return accuracy + 1e-6 / (1 + loss)


def pruned_model(trainer: PruningTrainer, folder: str) -> PretrainedModel:
    """Make a copy of the trained model with only the heads and neurons of one width, in eval mode.

    folder: where compress() keeps the best weights of the width, width_mult_X; those of the whole model or of the width.
    """
    width = next(width for width in trainer.args.width_mult_list if folder.endswith(width_folder(width)))
    model = narrowed(trainer.trained_model, width)
    model = trainer_compress._load_parameters(model, paddle.load(os.path.join(folder, WEIGHTS)))
    model.eval()
    return model


def narrowed(model: PretrainedModel, width: float) -> PretrainedModel:
    """Make a copy of a model with layers of this width, their weights not set yet."""
    return trainer_compress._get_dynabert_model(copy.deepcopy(model), width)


def width_folder(width: float) -> str:
    """Return the name that compress() gives the folder of a width."""
    return f"width_mult_{round(width, 2)}"


def export_widths(trainer: PruningTrainer, checkpoint: Checkpoint) -> None:
    """Turn each width's best weights, of the whole model, into a folder to deploy. Only the first process does so."""
    trainer.speed.close()
    if paddle.distributed.get_world_size() > 1:
        paddle.distributed.barrier()  # the weights are whole
    trainer.args.input_filename_prefix = "pruned_model"  # what the quantizing strategies go on with
    if not is_main_rank():
        return
    paddle.set_device("cpu")  # as in export_model.py
    for width in trainer.args.width_mult_list:
        folder = os.path.join(trainer.args.output_dir, width_folder(width))
        model = pruned_model(trainer, folder)
        model.to(device="cpu")
        paddle.save(model.state_dict(), os.path.join(folder, WEIGHTS))
        model.config.width_mult = width  # tells load_model that these are not the weights of a whole model
        model.config.save_pretrained(folder)
        write_deployment(checkpoint._replace(model=model), folder, "pruned_model", trainer.args.onnx)
    paddle.set_device(trainer.args.device)
