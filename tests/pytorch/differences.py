"""PyTorch's tests that pass with torch and, by design, fail with fastgen in its place.

Errors have no entries: a test accepts an error of fastgen's where it expects one of torch's (``run_file.py``). An entry
whose tests are not in the given version of PyTorch, or fail with torch itself, is ignored; one of whose tests all pass
has to go.
"""

from __future__ import annotations

_INTERNAL = "expects a call of torch's internal inference kernel, which our layers do not use"
_SCRIPT = "torch.jit.script of our layers raises; torch.compile and torch.export are supported"

DIFFERENCES: dict[str, dict[str, str]] = {
    "test_transformers.py": {
        r"^TestTransformers\w*\.test_scaled_dot_product_attention_.*_dropout_p_0_[25]_": (
            "repeats torch's random numbers; our dropout mask comes from a counter-based generator, whose numbers"
            " are the same on every device"
        ),
        r"^TestTransformers\w*\.test_scaled_dot_product_attention_.*_causal_attn_mask_dropout_p_0_0_": (
            "expects an error for is_causal beside attn_mask; ours combines them"
        ),
        r"^TestTransformers\w*\.test_(disable_fastpath|mask_check_fastpath)_": _INTERNAL,
        r"^TestTransformers\w*\.test_(script_encoder_subclass|script_mha_in_proj_weight_none)_": _SCRIPT,
        r"^TestTransformers\w*\.test_transformerencoderlayer_subclass(_model)?_": _SCRIPT,
        r"^TestTransformers\w*\.test_train_with_is_causal_": (
            "gives a mask of another length with is_causal and need_weights=False, where torch does not look at it;"
            " ours has the shape checked in every case, as torch does with need_weights=True"
        ),
    },
    "test_nn.py": {
        r"^TestNNDeviceType\w*\.test_transformerencoderlayer_[a-z]+_float32$": (
            "expects NaN where all keys are masked, from torch's internal inference kernel; ours gives attention 0, as"
            " torch does in training"
        ),
    },
    "nn/test_multihead_attention.py": {
        r"^TestMultiheadAttention\w*\.test_multihead_self_attn_two_masks_fast_path_mock_": _INTERNAL,
        r"^TestMultiheadAttention\w*\.test_multihead_attn_fast_path_query_and_bias_have_different_dtypes_": (
            "has an in_proj_bias in half precision beside weights in double precision; torch takes it for the strides"
            " that this test has, and refuses it for others"
        ),
    },
    "nn/test_packed_sequence.py": {},
}
"""By file: a regular expression that is searched for in Class.test, and the reason."""
