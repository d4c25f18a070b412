"""Stand-in for Triton's ONNX Runtime backend: runs <model>/<version>/model.onnx through the onnxruntime package, on the CPU.

The PyPI package nvidia-pytriton (0.7.0) has the server and its Python backend, but no ONNX Runtime backend: without this file
the server ends, as it finds none. start_server.py puts it as model.py into backends/onnxruntime/, and a repository made for
NVIDIA's image is served unchanged. It can go when the package has that backend.
"""

import json
import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        if args["model_instance_kind"] != "CPU":  # the server itself refuses KIND_GPU where there is no GPU
            raise pb_utils.TritonModelException(f"{args['model_name']}: this stand-in for the ONNX Runtime backend runs on the "
                                                "CPU, expected KIND_CPU (build_repository.py --device cpu) or NVIDIA's image")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors come as exceptions
        for name in ("intra_op_thread_count", "inter_op_thread_count"):
            threads = config.get("parameters", {}).get(name, {}).get("string_value")
            if threads:
                setattr(options, name.replace("thread_count", "num_threads"), int(threads))
        path = os.path.join(args["model_repository"], args["model_version"], config.get("default_model_filename") or "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs, self.outputs = ([item["name"] for item in config[kind]] for kind in ("input", "output"))

    def execute(self, requests):
        """Run all requests as one batch: the server puts together only such as are of one shape but for the texts.

        Where it fails each request runs alone, so that a bad one harms no other. A TritonError belongs to one response: the
        server crashes where two share it.
        """
        arrays = [[pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests] for name in self.inputs]
        try:
            results = self.session.run(self.outputs, {name: np.concatenate(parts) for name, parts in zip(self.inputs, arrays)})
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            if len(requests) > 1:
                return [response for request in requests for response in self.execute([request])]
            pb_utils.Logger.log_error(f"ONNX Runtime: {error}")
            return [pb_utils.InferenceResponse([], pb_utils.TritonError("the model could not be run, see the server's log"))]
        ends = np.cumsum([len(part) for part in arrays[0]])[:-1]
        parts = zip(*(np.split(result, ends) for result in results))
        return [pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in zip(self.outputs, part)])
                for part in parts]
