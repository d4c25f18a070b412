"""How prompt models and their masked language models are trained."""

from typing import TYPE_CHECKING, Any, Optional, Union

import numpy as np

from textcls.data.tokens import TokenizedTexts, pad_batch
from textcls.models.paddle_setup import paddle
from textcls.training.callbacks import is_best
from textcls.training.losses import rdrop_divergence, relation_loss
from textcls.training.trainer import ClassificationTrainer, join_logits, plain_library_errors

from paddlenlp.trainer import TrainerCallback

if TYPE_CHECKING:
    from paddlenlp.trainer import TrainerControl, TrainerState, TrainingArguments
    from paddlenlp.transformers import PretrainedModel, PretrainedTokenizer

MASKED_SHARE = 0.15  # of a text's tokens, in the training of a masked LM


class PromptTrainer(ClassificationTrainer):
    """ClassificationTrainer for the prompt models of textcls.models.prompt_model.

    args: TrainingArguments with the options ppt_* (what is no part of the pretrained model), use_rdrop, alpha_rdrop, use_rgl
    and alpha_rgl. The rest is as of ClassificationTrainer.
    """

    def create_optimizer(self, lr_scheduler: Optional[paddle.optimizer.lr.LRScheduler] = None) -> paddle.optimizer.Optimizer:
        if self.optimizer is None:
            args, own = self.args, {id(parameter) for parameter in self.unwrapped().prompt_parameters()}
            groups: list[dict[str, Any]] = [
                {"params": []}, {"params": [], "weight_decay": 0.0},
                {"params": [], "learning_rate": args.ppt_learning_rate / args.learning_rate,
                 "weight_decay": args.ppt_weight_decay, "beta1": args.ppt_adam_beta1, "beta2": args.ppt_adam_beta2,
                 "epsilon": args.ppt_adam_epsilon}]
            for name, parameter in self.model.named_parameters():
                if not parameter.stop_gradient:
                    group = 2 if id(parameter) in own else 1 if "bias" in name or "norm" in name else 0
                    groups[group]["params"].append(parameter)
            self.optimizer_grouped_parameters = [group for group in groups if group["params"]]
        return super().create_optimizer(lr_scheduler)

    def unwrapped(self) -> "PretrainedModel":
        """Return the model without what spreads it over processes."""
        return getattr(self.model, "_layers", self.model)

    def compute_loss(self, model: "PretrainedModel", inputs: dict[str, paddle.Tensor], return_outputs: bool = False
                     ) -> Union[paddle.Tensor, tuple[paddle.Tensor, paddle.Tensor]]:
        is_training, args = model.training, self.args
        if not is_training or not (args.use_rdrop or args.use_rgl):
            return super().compute_loss(model, inputs, return_outputs)
        input_ids, num_labels = inputs["input_ids"], len(self.labels)
        # both passes of R-Drop at once
        outputs = model(paddle.concat([input_ids, input_ids]) if args.use_rdrop else input_ids, with_features=True)
        joined = [join_logits(part, inputs["labels"], inputs.get("owners"), self.train_dataset.vote)
                  for part in (paddle.split(outputs, 2) if args.use_rdrop else [outputs])]
        parts, labels, features = [part[:, :num_labels] for part, _ in joined], joined[0][1], joined[0][0][:, num_labels:]
        loss = sum(self.criterion(part, labels) for part in parts) / len(parts)
        if args.use_rdrop:
            loss = loss + args.alpha_rdrop * rdrop_divergence(*parts)
        if args.use_rgl:
            loss = loss + args.alpha_rgl / 100 * relation_loss(features, labels)
        return (loss, parts[0]) if return_outputs else loss


class SaveBest(TrainerCallback):
    """Write a checkpoint after every evaluation that is the best so far: without it the library would only choose between the
    checkpoints that --save_steps happens to write."""

    def on_evaluate(self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl",
                    metrics: dict[str, float], **kwargs: Any) -> None:
        control.should_save = control.should_save or is_best(args, state, metrics)


def collate_masked(rows: list[dict[str, np.ndarray]], tokenizer: "PretrainedTokenizer", others: np.ndarray,
                   generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Make a batch for the training of a masked LM: of the tokens drawn, 80 % are masked, 10 % replaced, 10 % left as they are
    (BERT: Devlin et al. 2019, arXiv:1810.04805).

    rows: of TokenizedTexts; others: int64, the ids that may replace a token.
    Returns {"input_ids": int64 [batch, longest], "masked_positions": int64 [num_drawn], positions in the flattened batch,
    "labels": int64 [num_drawn], what stood there}.
    """
    input_ids = pad_batch([row["input_ids"] for row in rows], tokenizer.pad_token_id)
    usable = ~np.isin(input_ids, tokenizer.all_special_ids)
    drawn = np.flatnonzero((generator.random(input_ids.shape) < MASKED_SHARE) & usable)
    if not len(drawn):
        drawn = np.flatnonzero(usable)[:1] if usable.any() else np.array([0])
    labels, fate = input_ids.ravel()[drawn], generator.random(len(drawn))
    replaced = np.where(fate < 0.8, tokenizer.mask_token_id, labels)
    input_ids.ravel()[drawn] = np.where(fate >= 0.9, generator.choice(others, len(drawn)), replaced)
    return {"input_ids": input_ids, "masked_positions": drawn, "labels": labels}


def pretrain(model: "PretrainedModel", tokenizer: "PretrainedTokenizer", tokens: TokenizedTexts,
             args: "TrainingArguments") -> None:
    """Train a masked LM further on texts of its later domain (Gururangan et al. 2020, arXiv:2004.10964), in place.

    model: of `load_model(head="MaskedLM")`; tokens: without a prompt.
    """
    generator, others = np.random.default_rng(args.seed), np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    trainer = ClassificationTrainer([], None, args, model=model, criterion=paddle.nn.CrossEntropyLoss(), tokenizer=tokenizer,
                                    data_collator=lambda rows: collate_masked(rows, tokenizer, others, generator),
                                    train_dataset=tokens)
    with plain_library_errors():
        trainer.train()
    model.eval()
