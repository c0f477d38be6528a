#include "projection/cpu/heads.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/cpu/convert.h"
#include "common/cpu/levels.h"
#include "common/cpu/sums.h"

namespace fastgen::cpu {
namespace {

constexpr int64_t kLanes = 16;     // parallel partial sums
constexpr int64_t kGrain = 16384;  // elements per task

// Rotates the pairs of a row in place; sign = -1 applies the inverse rotation.
FASTGEN_HOST_DEVICE void rotate(float* __restrict__ row, const HeadsParams& p, int64_t batch, int64_t token,
                                float sign) {
  const int64_t half = p.half, at = batch * p.table_batch + token * half;
  const float* __restrict__ cos = p.cos + at;
  const float* __restrict__ sin = p.sin + at;
  const int64_t step = p.interleaved ? 2 : 1, apart = p.interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = row[i * step], b = row[i * step + apart], s = sign * sin[i];
    row[i * step] = a * cos[i] - b * s;
    row[i * step + apart] = b * cos[i] + a * s;
  }
}

struct Row {
  int64_t batch, token, head;

  FASTGEN_HOST_DEVICE Row(const HeadsParams& p, int64_t index)
      : batch(index / (p.heads * p.tokens)), token(index / p.heads % p.tokens), head(index % p.heads) {}
  template <typename T>
  FASTGEN_HOST_DEVICE T* of(const Heads& heads) const {
    return static_cast<T*>(heads.data) + batch * heads.batch + token * heads.token + head * heads.head;
  }
};

template <typename T>
FASTGEN_HOST_DEVICE float inverse_rms(const T* __restrict__ y, const HeadsParams& p) {
  const float squares = sum_row<kLanes>(p.dim, [=](int64_t j) { return to_float(y[j]) * to_float(y[j]); });
  return 1.0f / std::sqrt(squares / static_cast<float>(p.dim) + p.eps);
}

template <typename T>
FASTGEN_HOST_DEVICE void forward_rows(const HeadsParams& p, int64_t begin, int64_t end) {
  float row[kWidestHead];
  for (int64_t index = begin; index < end; ++index) {
    const Row at(p, index);
    const T* __restrict__ y = at.of<T>(p.input);
    T* __restrict__ out = at.of<T>(p.output);
    if (p.norm != nullptr) {
      const float scale = inverse_rms(y, p);
      for (int64_t j = 0; j < p.dim; ++j) row[j] = to_float(y[j]) * scale * p.norm[j];
    } else {
      for (int64_t j = 0; j < p.dim; ++j) row[j] = to_float(y[j]);
    }
    if (p.cos != nullptr) rotate(row, p, at.batch, at.token, 1.0f);
    for (int64_t j = 0; j < p.dim; ++j) out[j] = from_float<T>(row[j]);
  }
}

// With a norm: accumulates its gradient in grad_norm.
template <typename T>
FASTGEN_HOST_DEVICE void backward_rows(const HeadsParams& p, int64_t begin, int64_t end,
                                       float* __restrict__ grad_norm) {
  float row[kWidestHead];
  for (int64_t index = begin; index < end; ++index) {
    const Row at(p, index);
    const T* __restrict__ grad = at.of<T>(p.grad);
    T* __restrict__ out = at.of<T>(p.output);
    for (int64_t j = 0; j < p.dim; ++j) row[j] = to_float(grad[j]);
    if (p.cos != nullptr) rotate(row, p, at.batch, at.token, -1.0f);
    if (p.norm == nullptr) {
      for (int64_t j = 0; j < p.dim; ++j) out[j] = from_float<T>(row[j]);
      continue;
    }
    const T* __restrict__ y = at.of<T>(p.input);
    const float scale = inverse_rms(y, p);
    const float* __restrict__ current = row;
    const float inner =
        sum_row<kLanes>(p.dim, [=](int64_t j) { return current[j] * p.norm[j] * to_float(y[j]); }) * scale;
    const float mean = inner / static_cast<float>(p.dim);
    for (int64_t j = 0; j < p.dim; ++j) {
      const float unit = to_float(y[j]) * scale;
      grad_norm[j] += row[j] * unit;
      out[j] = from_float<T>(scale * (row[j] * p.norm[j] - unit * mean));
    }
  }
}

FASTGEN_HOST_DEVICE void forward(const HeadsParams& p, DType dtype, int64_t begin, int64_t end) {
  switch (dtype) {
    case DType::kFloat32: return forward_rows<float>(p, begin, end);
    case DType::kFloat16: return forward_rows<Half>(p, begin, end);
    case DType::kBFloat16: return forward_rows<BFloat16>(p, begin, end);
  }
}

FASTGEN_HOST_DEVICE void backward(const HeadsParams& p, DType dtype, int64_t begin, int64_t end, float* grad_norm) {
  switch (dtype) {
    case DType::kFloat32: return backward_rows<float>(p, begin, end, grad_norm);
    case DType::kFloat16: return backward_rows<Half>(p, begin, end, grad_norm);
    case DType::kBFloat16: return backward_rows<BFloat16>(p, begin, end, grad_norm);
  }
}

}  // namespace

void heads_epilogue(const HeadsParams& p, DType dtype) {
  const int64_t rows = p.batch * p.tokens * p.heads, grain = std::max<int64_t>(1, kGrain / p.dim);
  const auto run = for_level<forward>();
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { run(p, dtype, begin, end); });
}

void heads_epilogue_backward(const HeadsParams& p, DType dtype) {
  // The norm's gradient is summed over fixed pieces, so that it does not depend on the number of threads.
  const int64_t rows = p.batch * p.tokens * p.heads, piece = std::max<int64_t>(1, kGrain / p.dim);
  const int64_t pieces = ceil_div(rows, piece), dim = p.dim;
  const auto run = for_level<backward>();
  std::vector<float> sums(p.norm == nullptr ? 0 : static_cast<size_t>(pieces * dim));
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      run(p, dtype, i * piece, std::min(rows, (i + 1) * piece), p.norm == nullptr ? nullptr : &sums[i * dim]);
    }
  });
  if (p.norm == nullptr) return;
  std::fill(p.grad_norm, p.grad_norm + dim, 0.0f);
  for (int64_t i = 0; i < pieces; ++i) {
    for (int64_t j = 0; j < dim; ++j) p.grad_norm[j] += sums[i * dim + j];
  }
}

}  // namespace fastgen::cpu
