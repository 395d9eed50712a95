"""ONNX -> FP32 TFLite with onnx2tf. Run by its own environment: request.json, in/model.onnx -> out/model.tflite."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path


def main() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import onnx2tf

    work = Path("tmp/work")
    # The simplifier is another process and another source of differences; the graph comes folded already.
    onnx2tf.convert(
        input_onnx_file_path="in/model.onnx",
        output_folder_path=str(work),
        not_use_onnxsim=True,
        copy_onnx_input_output_names_to_tflite=True,
        non_verbose=True,
        verbosity="error",
    )
    shutil.move(str(work / "model_float32.tflite"), "out/model.tflite")
    Path("out/answer.json").write_text(json.dumps({"tool": f"onnx2tf {onnx2tf.__version__}"}))


if __name__ == "__main__":
    main()
