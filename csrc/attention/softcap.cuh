// Soft-capped scores (Gemma Team, "Gemma 2", 2024, section 2). With x = scale * q.k, c = softcap and t = tanh(x / c):
//
//   score y = c t        derivative g = dy/dx = 1 - t^2        curvature = x' d2y/dx2 = -2 t g x' / c for a tangent x'
//
// The mask is added to y. The tangent of y is g x'. With dS and dS2, the first and second order gradients of y and of
// the mask, those of x are g dS and g dS2 + curvature dS.
//
// Only instantiations with kPlain == false cap scores; there, one uniform branch tells whether.
#pragma once

#include <cmath>

#include "attention/mask.cuh"

namespace fastgen::attention {

__device__ __forceinline__ bool is_capped(const Problem& p) { return p.softcap != 0.0f; }

// One score, from the product q.k.
struct CappedScore {
  float tanh, derivative;

  __device__ __forceinline__ CappedScore(float product, const Problem& p)
      : tanh(tanhf(product * p.inner_scale)), derivative(fmaf(-tanh, tanh, 1.0f)) {}
  __device__ __forceinline__ float score(const Problem& p) const { return p.softcap * kLog2e * tanh; }  // unit: log2
  // ``tangent``: of the product.
  __device__ __forceinline__ float curvature(float tangent, const Problem& p) const {
    return -2.0f * tanh * derivative * (tangent * p.inner_scale);
  }
};

// Caps the products q.k, if the problem has a softcap. Returns the factor by which mask_scores has to multiply them.
template <bool kPlain, int kFragments, int kTiles>
__device__ __forceinline__ float cap_scores(float (&scores)[kFragments][kTiles][4], const Problem& p) {
  if constexpr (!kPlain) {
    if (is_capped(p)) {
#pragma unroll
      for (auto& rows : scores) {
#pragma unroll
        for (auto& tile : rows) {
#pragma unroll
          for (float& score : tile) score = CappedScore(score, p).score(p);
        }
      }
      return 1.0f;
    }
  }
  return p.scale * kLog2e;
}

// The same, and multiplies ``grads`` by the derivatives.
template <bool kPlain, int kFragments, int kTiles>
__device__ __forceinline__ float cap_scores(float (&scores)[kFragments][kTiles][4],
                                            float (&grads)[kFragments][kTiles][4], const Problem& p) {
  if constexpr (!kPlain) {
    if (is_capped(p)) {
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const CappedScore capped(scores[m][tile][i], p);
            scores[m][tile][i] = capped.score(p);
            grads[m][tile][i] *= capped.derivative;
          }
        }
      }
      return 1.0f;
    }
  }
  return p.scale * kLog2e;
}

// The same, with the tangents of the products, which become those of the scores. ``scale``: the factor of both.
template <bool kPlain, int kTiles>
__device__ __forceinline__ float cap_direction(float (&scores)[1][kTiles][4], float (&direction)[1][kTiles][4],
                                               const Problem& p, float& scale) {
  scale = p.scale;
  if constexpr (!kPlain) {
    if (is_capped(p)) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const CappedScore capped(scores[0][tile][i], p);
          scores[0][tile][i] = capped.score(p);
          direction[0][tile][i] *= p.scale * capped.derivative;
        }
      }
      scale = 1.0f;
      return 1.0f;
    }
  }
  return p.scale * kLog2e;
}

// From the first and second order gradients of y to those of x, in place, of one score. A gradient of 0 stays 0, even
// if a masked key contains inf or NaN.
__device__ __forceinline__ void cap_gradient(float& first, float& second, float product, float tangent,
                                             const Problem& p) {
  if (first == 0.0f && second == 0.0f) return;
  const CappedScore capped(product, p);
  second = capped.derivative * second + capped.curvature(tangent, p) * first;
  first *= capped.derivative;
}

// The same for a tile. ``products`` and their ``tangents`` are computed once more for it: kernels have no registers for
// the derivatives beside the scores.
template <int kTiles>
__device__ __forceinline__ void cap_gradients(float (&first)[1][kTiles][4], float (&second)[1][kTiles][4],
                                              const float (&products)[1][kTiles][4],
                                              const float (&tangents)[1][kTiles][4], const Problem& p) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      cap_gradient(first[0][tile][i], second[0][tile][i], products[0][tile][i], tangents[0][tile][i], p);
    }
  }
}

template <int kTiles>
__device__ __forceinline__ void clear(float (&scores)[1][kTiles][4]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[0][tile][i] = 0.0f;
  }
}

}  // namespace fastgen::attention
