// Operator cpu_attention_weights: the elementwise part of one tile of fastgen/ops/attention/tangent.py.
#include "attention/cpu/tile_operands.h"
#include "attention/cpu/weights.h"

namespace fastgen::cpu {
namespace {

Tensor weights(const Tensor& scores, const Tensor& direction, const Tensor& lse, const MaybeTensor& keep,
               const MaybeTensor& grads, const MaybeTensor& delta, const MaybeTensor& cross) {
  STD_TORCH_CHECK(grads.has_value() == delta.has_value() && (grads.has_value() || !cross.has_value()),
                  "grads: expected together with delta, and wherever cross is");
  const TileSize size(scores);
  WeightsParams p = {};
  p.keys = size.keys, p.rows = size.rows;
  p.scores = matrix(scores, "scores", scores), p.direction = matrix(direction, "direction", scores);
  p.lse = row_vector(lse, "lse", scores, p.rows);
  if (grads.has_value()) {
    p.grads = matrix(*grads, "grads", scores), p.delta = row_vector(*delta, "delta", scores, p.rows);
  }
  if (cross.has_value()) p.cross = matrix(*cross, "cross", scores);
  if (keep.has_value()) p.keep = matrix(*keep, "keep", scores);
  const int64_t elements = p.rows * p.keys;
  check_apart({{"scores", p.scores, elements},
               {"direction", p.direction, elements},
               {"grads", p.grads, elements},
               {"cross", p.cross, elements}},
              {{"keep", p.keep, elements}, {"lse", p.lse, p.rows}, {"delta", p.delta, p.rows}});
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
