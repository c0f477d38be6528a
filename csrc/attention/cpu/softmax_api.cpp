// Operators cpu_attention_softmax and its backward: the elementwise part of one tile of
// fastgen/ops/attention/blocked.py.
#include "attention/cpu/softmax.h"
#include "attention/cpu/tile_operands.h"

namespace fastgen::cpu {
namespace {

SoftmaxParams params_of(const Tensor& scores, const MaybeTensor& keep, const Tensor& lse) {
  const TileSize size(scores);
  SoftmaxParams p = {};
  p.keys = size.keys, p.rows = size.rows;
  p.scores = matrix(scores, "scores", scores);
  if (keep.has_value()) p.keep = matrix(*keep, "keep", scores);
  p.lse = row_vector(lse, "lse", scores, p.rows);
  return p;
}

void softmax(const Tensor& scores, const MaybeTensor& keep, const Tensor& lse) {
  const SoftmaxParams p = params_of(scores, keep, lse);
  const int64_t size = p.rows * p.keys;
  check_apart({{"scores", p.scores, size}, {"lse", p.lse, p.rows}}, {{"keep", p.keep, size}});
  attention_softmax(p);
}

void backward(const Tensor& scores, const Tensor& grads, const MaybeTensor& keep, const Tensor& lse,
              const Tensor& delta) {
  SoftmaxParams p = params_of(scores, keep, lse);
  p.grads = matrix(grads, "grads", scores), p.delta = row_vector(delta, "delta", scores, p.rows);
  const int64_t size = p.rows * p.keys;
  check_apart({{"scores", p.scores, size}, {"grads", p.grads, size}},
              {{"keep", p.keep, size}, {"lse", p.lse, p.rows}, {"delta", p.delta, p.rows}});
  attention_softmax_backward(p);
}

}  // namespace

FASTGEN_LIBRARY_IMPL(FASTGEN_NAMESPACE, FASTGEN_DISPATCH_KEY, m) {
  m.impl("cpu_attention_softmax", TORCH_BOX(&softmax));
  m.impl("cpu_attention_softmax_backward", TORCH_BOX(&backward));
}

}  // namespace fastgen::cpu
