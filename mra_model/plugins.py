"""What other programs load by entry point: vLLM's general plug-in and lmms-eval's model.

Nothing of theirs is imported before they ask for it.
"""

from typing import Any


def register() -> None:
    """`vllm.general_plugins`: vLLM calls it in each of its processes, more than once in some."""
    import mra_model  # noqa: F401


def lmms_eval_manifest() -> Any:
    """`lmms_eval.models`: the model `llava_hr`, which lmms-eval's class for transformers' Llava runs as it is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    register()
    return ModelManifest(model_id="llava_hr", simple_class_path="lmms_eval.models.simple.llava_hf.LlavaHf")
