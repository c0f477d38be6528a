// CPU backend of latent/launch.h: the same arithmetic as the CUDA kernels (latent/terms.h), vectorized.
//
// Parallel over blocks of kBlock columns of one row. The noise of consecutive groups is generated into a buffer first,
// so that short rows fill the vectors as well as long ones.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "common/cpu/convert.h"
#include "common/cpu/levels.h"
#include "common/cpu/normals.h"
#include "common/cpu/pages.h"
#include "common/dispatch.h"
#include "common/philox.h"
#include "latent/launch.h"
#include "latent/terms.h"

namespace fastgen::latent {
namespace {

constexpr int64_t kBlock =
    256;  // columns; a multiple of kGroup; small, so that memory traffic overlaps with noise generation
constexpr int64_t kGroups = kBlock / kGroup;
constexpr int64_t kElementsPerTask = 16 * 1024;

// ``count`` columns of one row. Without a prior: null pointers (unit normal); with one of the two, the other is zeros.
template <typename T>
struct ForwardBlock {
  const T *mu, *logvar, *prior_mu, *prior_logvar;
  T* z;
  const float* noise;
  int64_t count;
};

// An absent grad_z is zeros; the gradients of an absent prior are written to a scratch buffer.
template <typename T>
struct BackwardBlock {
  const T *grad_z, *mu, *logvar, *prior_mu, *prior_logvar;
  T *grad_mu, *grad_logvar, *grad_prior_mu, *grad_prior_logvar;
  const float* noise;
  float grad_kl;
  int64_t count;
};

constexpr int kLanes = 16;

// A sum with kLanes partial sums: vectorizes without -ffast-math, and rounds less than a single running sum.
FASTGEN_HOST_DEVICE float sum(const float* terms, int64_t count) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += terms[i + lane];
  }
  for (int lane = 0; i < count; ++i, ++lane) lanes[lane] += terms[i];
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

// z of a block; returns twice its contribution to the KL divergence.
template <typename T>
FASTGEN_HOST_DEVICE float forward_block(const ForwardBlock<T>& b) {
  alignas(64) float terms[kBlock];
  if (b.prior_mu == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < b.count; ++i) {
      const float z = forward_element(b.noise[i], cpu::to_float(b.mu[i]), cpu::to_float(b.logvar[i]), terms[i]);
      b.z[i] = cpu::from_float<T>(z);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < b.count; ++i) {
      const float z = forward_element(b.noise[i], cpu::to_float(b.mu[i]), cpu::to_float(b.logvar[i]),
                                      cpu::to_float(b.prior_mu[i]), cpu::to_float(b.prior_logvar[i]), terms[i]);
      b.z[i] = cpu::from_float<T>(z);
    }
  }
  return sum(terms, b.count);
}

template <typename T>
FASTGEN_HOST_DEVICE void backward_block(const BackwardBlock<T>& b) {
  if (b.prior_mu == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < b.count; ++i) {
      const Gradients g = gradients(cpu::to_float(b.grad_z[i]), b.grad_kl, b.noise[i], cpu::to_float(b.mu[i]),
                                    cpu::to_float(b.logvar[i]));
      b.grad_mu[i] = cpu::from_float<T>(g.mu);
      b.grad_logvar[i] = cpu::from_float<T>(g.logvar);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < b.count; ++i) {
      const Gradients g =
          gradients(cpu::to_float(b.grad_z[i]), b.grad_kl, b.noise[i], cpu::to_float(b.mu[i]),
                    cpu::to_float(b.logvar[i]), cpu::to_float(b.prior_mu[i]), cpu::to_float(b.prior_logvar[i]));
      b.grad_mu[i] = cpu::from_float<T>(g.mu);
      b.grad_logvar[i] = cpu::from_float<T>(g.logvar);
      b.grad_prior_mu[i] = cpu::from_float<T>(g.prior_mu);
      b.grad_prior_logvar[i] = cpu::from_float<T>(g.prior_logvar);
    }
  }
}

template <typename T>
const T* at_row(const Input& input, int64_t row, int64_t col) {
  return input.data == nullptr ? nullptr : static_cast<const T*>(input.data) + row * input.row_stride + col;
}

template <typename T>
constexpr T kZeros[kBlock] = {};

// Zeros if the operand is absent.
template <typename T>
const T* at_row_or_zeros(const Input& input, int64_t row, int64_t col) {
  return input.data == nullptr ? kZeros<T> : at_row<T>(input, row, col);
}

template <typename T>
T* at_row(void* output, int64_t row, int64_t cols, int64_t col) {
  return output == nullptr ? nullptr : static_cast<T*>(output) + row * cols + col;
}

// Requests the cache lines of ``count`` elements of a row. Rows are short streams, often in pages of their own, which
// the processor's prefetchers begin too late; here they load while noise is generated.
template <typename T>
FASTGEN_HOST_DEVICE void prefetch(const Input& input, int64_t row, int64_t col, int64_t count) {
  if (input.data == nullptr) return;
  const char* data = reinterpret_cast<const char*>(at_row<T>(input, row, col));
  for (int64_t byte = 0; byte < count * static_cast<int64_t>(sizeof(T)); byte += 64) __builtin_prefetch(data + byte);
}

// Calls body(row, col, count, noise) for every block of the matrix, in parallel, with the block's noise
// (null where with_noise is false).
// prefetch(row, col, count) is called for a later block before the noise of each block is generated.
template <typename Prefetch, typename Body>
void for_each_block(int64_t rows, int64_t cols, const Noise& noise, bool with_noise, const Prefetch& prefetch,
                    const Body& body) {
  const int64_t row_groups = ceil_div(cols, kGroup);
  const int64_t blocks = std::max<int64_t>(1, ceil_div(cols, kBlock));
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, std::min(cols, kBlock)));
  torch::stable::parallel_for(0, rows * blocks, grain, [&](int64_t begin, int64_t end) {
    alignas(64) float buffer[kBlock];
    // The buffer holds groups [cached, cached_end) of the rows of seed number cached_seed.
    int64_t cached_seed = -1, cached = 0, cached_end = 0;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / blocks, col = item % blocks * kBlock;
      if (blocks > 1 && item + 1 < end) {
        const int64_t next = (item + 1) % blocks * kBlock;
        prefetch((item + 1) / blocks, next, std::min(kBlock, cols - next));
      }
      const int64_t count = std::min(kBlock, cols - col);
      const int64_t seed_index = row / noise.rows_per_seed;
      const int64_t first = (row - seed_index * noise.rows_per_seed) * row_groups + col / kGroup;
      const int64_t needed = ceil_div(count, kGroup);
      if (with_noise && (seed_index != cached_seed || first < cached || first + needed > cached_end)) {
        // Short rows: generate the noise of several rows at once, so that the vectors are full.
        const int64_t rows_left = std::min((end - item - 1) / blocks + 1, (seed_index + 1) * noise.rows_per_seed - row);
        const int64_t groups =
            blocks == 1 ? std::min(kGroups / std::max<int64_t>(1, needed), rows_left) * needed : needed;
        cpu::standard_normals(static_cast<uint64_t>(noise.seeds[seed_index]), static_cast<uint64_t>(first), groups,
                              buffer);
        cached_seed = seed_index, cached = first, cached_end = first + groups;
      }
      body(row, col, count, with_noise ? buffer + (first - cached) * kGroup : nullptr);
    }
  });
}

template <typename T>
void forward(const ForwardParams& p) {
  cpu::prefer_large_pages(p.z, p.rows * p.cols * sizeof(T));
  const int64_t blocks = std::max<int64_t>(1, ceil_div(p.cols, kBlock));
  const bool prior = p.prior_mu.data != nullptr || p.prior_logvar.data != nullptr;
  std::vector<float> parts(blocks > 1 && p.kl != nullptr ? p.rows * blocks : 0);
  const auto run = cpu::for_level<forward_block<T>>();
  const auto load = [&](int64_t row, int64_t col, int64_t count) {
    for (const Input* input : {&p.mu, &p.logvar, &p.prior_mu, &p.prior_logvar}) prefetch<T>(*input, row, col, count);
  };
  for_each_block(p.rows, p.cols, p.noise, true, load, [&](int64_t row, int64_t col, int64_t count, const float* noise) {
    const float kl = run(ForwardBlock<T>{at_row<T>(p.mu, row, col), at_row<T>(p.logvar, row, col),
                                         prior ? at_row_or_zeros<T>(p.prior_mu, row, col) : nullptr,
                                         prior ? at_row_or_zeros<T>(p.prior_logvar, row, col) : nullptr,
                                         at_row<T>(p.z, row, p.cols, col), noise, count});
    if (p.kl == nullptr) return;
    if (blocks > 1) {
      parts[row * blocks + col / kBlock] = kl;
    } else {
      p.kl[row] = 0.5f * kl;
    }
  });
  for (int64_t row = 0; !parts.empty() && row < p.rows; ++row) {
    double sum = 0.0;
    for (int64_t i = 0; i < blocks; ++i) sum += parts[row * blocks + i];
    p.kl[row] = static_cast<float>(0.5 * sum);
  }
}

template <typename T>
void backward(const BackwardParams& p) {
  for (void* output : {p.grad_mu, p.grad_logvar, p.grad_prior_mu, p.grad_prior_logvar}) {
    cpu::prefer_large_pages(output, p.rows * p.cols * sizeof(T));
  }
  const bool with_noise = p.grad_z.data != nullptr;
  const bool prior = p.prior_mu.data != nullptr || p.prior_logvar.data != nullptr;
  const auto run = cpu::for_level<backward_block<T>>();
  const auto load = [&](int64_t row, int64_t col, int64_t count) {
    for (const Input* input : {&p.grad_z, &p.mu, &p.logvar, &p.prior_mu, &p.prior_logvar}) {
      prefetch<T>(*input, row, col, count);
    }
  };
  for_each_block(p.rows, p.cols, p.noise, with_noise, load,
                 [&](int64_t row, int64_t col, int64_t count, const float* noise) {
                   alignas(64) T unread[2][kBlock];
                   run(BackwardBlock<T>{
                       at_row_or_zeros<T>(p.grad_z, row, col), at_row<T>(p.mu, row, col), at_row<T>(p.logvar, row, col),
                       prior ? at_row_or_zeros<T>(p.prior_mu, row, col) : nullptr,
                       prior ? at_row_or_zeros<T>(p.prior_logvar, row, col) : nullptr,
                       at_row<T>(p.grad_mu, row, p.cols, col), at_row<T>(p.grad_logvar, row, p.cols, col),
                       p.grad_prior_mu == nullptr ? unread[0] : at_row<T>(p.grad_prior_mu, row, p.cols, col),
                       p.grad_prior_logvar == nullptr ? unread[1] : at_row<T>(p.grad_prior_logvar, row, p.cols, col),
                       with_noise ? noise : kZeros<float>,
                       p.grad_kl == nullptr ? 0.0f : p.grad_kl[row * p.grad_kl_stride], count});
                 });
}

}  // namespace

int multiprocessors() { return 1; }

void launch_forward(const ForwardParams& params, DType dtype, void*) {
  dispatch_dtype(dtype, [&](auto type) { forward<typename decltype(type)::type>(params); });
}

void launch_backward(const BackwardParams& params, DType dtype, void*) {
  dispatch_dtype(dtype, [&](auto type) { backward<typename decltype(type)::type>(params); });
}

}  // namespace fastgen::latent
