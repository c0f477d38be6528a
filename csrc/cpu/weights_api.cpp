// cpu_attention_weights as an operator: what ops/_attention_tangent.py does to a tile.
#include "common/torch_api.h"
#include "cpu/weights.h"

namespace fastgen::cpu {
namespace {

float* matrix(const Tensor& tensor, const char* name, const Tensor& scores) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.dim() == scores.dim() &&
                      tensor.numel() == scores.numel() && tensor.size(-1) == scores.size(-1),
                  name, ": expected a contiguous float32 tensor with the dims of scores");
  return static_cast<float*>(tensor.mutable_data_ptr());
}

const float* rows(const Tensor& tensor, const char* name, int64_t count) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == count, name,
                  ": expected a contiguous float32 tensor with an element for each row of scores");
  return tensor.const_data_ptr<float>();
}

Tensor weights(const Tensor& scores, const Tensor& direction, const Tensor& lse, const std::optional<Tensor>& keep,
               const std::optional<Tensor>& grads, const std::optional<Tensor>& delta,
               const std::optional<Tensor>& cross) {
  STD_TORCH_CHECK(scores.dim() >= 1, "scores: expected at least one dim");
  STD_TORCH_CHECK(grads.has_value() == delta.has_value() && (grads.has_value() || !cross.has_value()),
                  "grads: expected together with delta, and wherever cross is");
  WeightsParams p = {};
  p.keys = scores.size(-1), p.rows = lse.numel();
  STD_TORCH_CHECK(p.rows * p.keys == scores.numel(), "lse: expected an element for each row of scores");
  p.scores = matrix(scores, "scores", scores), p.direction = matrix(direction, "direction", scores);
  if (grads.has_value()) p.grads = matrix(*grads, "grads", scores), p.delta = rows(*delta, "delta", p.rows);
  if (cross.has_value()) p.cross = matrix(*cross, "cross", scores);
  if (keep.has_value()) p.keep = matrix(*keep, "keep", scores);
  p.lse = rows(lse, "lse", p.rows);
  Tensor row = torch::stable::empty_like(lse);
  p.row = static_cast<float*>(row.mutable_data_ptr());
  attention_weights(p);
  return row;
}

}  // namespace

FASTGEN_LIBRARY_IMPL(FASTGEN_NAMESPACE, FASTGEN_DISPATCH_KEY, m) {
  m.impl("cpu_attention_weights", TORCH_BOX(&weights));
}

}  // namespace fastgen::cpu
