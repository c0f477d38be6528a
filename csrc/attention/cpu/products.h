// Products of small matrices from registers, and the layouts that they read.
//
// Panels   columns in panels of kPanel:  element (k, j) at [j / kPanel][k][j % kPanel]
// Groups   rows in groups of kGroup:     element (i, k) at [i / kGroup][k][i % kGroup]
// Tile     kTile keys of scores:         element (i, j) at [i][j], rows kTileRow apart
//
// A product reads one column of a register tile's rows and one row of its columns per step, so both are contiguous
// in Groups and Panels. Columns are padded with zeros to whole vectors, rows to whole groups.
//
// Keys and their gradients do not fit L2. A product with ``ahead`` prefetches what the same product reads of the next
// block of keys: hardware prefetchers stop at the end of each panel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/cpu/levels.h"
#include "common/cpu/vector.h"
#include "common/types.h"

namespace fastgen::cpu {

constexpr int kTile = 96;             // a multiple of every kPanel and kGroup
constexpr int kTileRow = kTile + 16;  // an odd number of cache lines: a column is in all cache sets
constexpr int kRowStep = 12;          // a multiple of every kGroup; memory is for a multiple of it
static_assert(kTileRow / 16 % 2 == 1, "rows of a tile are an odd number of cache lines apart");

FASTGEN_HOST_DEVICE constexpr int64_t round_up(int64_t count, int64_t step) { return ceil_div(count, step) * step; }

// c[i][j] = (kAdd ? c[i][j] : 0) + sum over k of a[i * kARow + k * kAStep] * b[k * kBStep + j], for kRows rows and
// kVectors vectors of columns.
template <int kWidth, int kRows, int kVectors, int kARow, int kAStep, int kBStep, int kCRow, bool kAdd>
FASTGEN_HOST_DEVICE void multiply_registers(const float* __restrict__ a, const float* __restrict__ b, int64_t steps,
                                            float* __restrict__ c) {
  static_assert(kRows <= 16 && kVectors <= 2, "the loops are unrolled");
  Vector<kWidth> sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < steps; ++k) {
    Vector<kWidth> row[kVectors];
    FASTGEN_UNROLL
    for (int v = 0; v < kVectors; ++v) row[v] = reinterpret_cast<const Vector<kWidth>*>(b + k * kBStep)[v];
    FASTGEN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const float factor = a[i * kARow + k * kAStep];
      FASTGEN_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[i][v] += factor * row[v];
    }
  }
  FASTGEN_UNROLL
  for (int i = 0; i < kRows; ++i) {
    FASTGEN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Vector<kWidth>& entry = reinterpret_cast<Vector<kWidth>*>(c + i * kCRow)[v];
      entry = kAdd ? entry + sums[i][v] : sums[i][v];
    }
  }
}

// Requests [data, data + count) from L3 or memory into L2.
FASTGEN_HOST_DEVICE void prefetch(const float* data, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(float);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(data + i, 0, 2);
}

// Columns of 8 floats of kRows rows, at most 8: columns[c][i] = from[i * stride + c]. Elements of other rows are
// undefined.
template <int kRows>
FASTGEN_HOST_DEVICE void load_columns(const float* from, int64_t stride, Vector<8> (&columns)[8]) {
  Vector<8> a[8], b[8];
  FASTGEN_UNROLL
  for (int i = 0; i < 8; ++i) a[i] = *reinterpret_cast<const Vector<8>*>(from + (i < kRows ? i : 0) * stride);
#if defined(__has_builtin) && !defined(__clang__)
#if __has_builtin(__builtin_shufflevector)
#define FASTGEN_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#endif
#endif
#ifdef FASTGEN_SHUFFLE
  FASTGEN_UNROLL
  for (int i = 0; i < 8; i += 2) {
    b[i] = FASTGEN_SHUFFLE(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] = FASTGEN_SHUFFLE(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  FASTGEN_UNROLL
  for (int i = 0; i < 8; i += 4) {
    for (int k = 0; k < 2; ++k) {
      a[i + 2 * k] = FASTGEN_SHUFFLE(b[i + k], b[i + k + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      a[i + 2 * k + 1] = FASTGEN_SHUFFLE(b[i + k], b[i + k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  FASTGEN_UNROLL
  for (int i = 0; i < 4; ++i) {
    columns[i] = FASTGEN_SHUFFLE(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    columns[i + 4] = FASTGEN_SHUFFLE(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#undef FASTGEN_SHUFFLE
#else
  for (int c = 0; c < 8; ++c) {
    for (int i = 0; i < 8; ++i) columns[c][i] = a[i][c];
  }
  (void)b;
#endif
}

// Register tiles: 12 x 2 accumulators use 24 of 32 registers (AVX-512, NEON), 6 x 2 use 12 of 16.
constexpr int kGenericGroup = kGenericRegisters * 3 / 8;

template <int kWidth, int kGroup>
struct Products {
  static constexpr int kPanel = 2 * kWidth;
  static_assert(kTile % kPanel == 0 && kRowStep % kGroup == 0 && kTile % kRowStep == 0, "no register tile is cut");

  // Floats of ``count`` rows of Panels with ``dim`` columns.
  static constexpr int64_t panels_size(int64_t count, int64_t dim) { return round_up(dim, kPanel) * count; }

  // Floats of a panel of ``size`` that each group of ``rows`` rows prefetches.
  FASTGEN_HOST_DEVICE static int64_t share_of(int64_t size, int64_t rows, bool ahead) {
    return ahead ? round_up(ceil_div(size * kGroup, rows), 16) : 0;
  }

  // Tile = A B^T: A (rows, steps) in Groups ``a_group`` apart, B^T (steps, keys) in Panels ``b_panel`` apart.
  FASTGEN_HOST_DEVICE static void scores(const float* a, int64_t a_group, int64_t rows, const float* b, int64_t b_panel,
                                         int64_t keys, int64_t steps, float* tile, bool ahead) {
    const int64_t share = share_of(steps * kPanel, rows, ahead);
    for (int64_t j = 0; j < keys; j += kPanel, b += b_panel) {
      if (keys - j > kWidth) {
        const float* next = b + kTile / kPanel * b_panel;
        for (int64_t i = 0; i < rows; i += kGroup, next += share) {
          prefetch(next, share);
          multiply_registers<kWidth, kGroup, 2, 1, kGroup, kPanel, kTileRow, false>(a + i / kGroup * a_group, b, steps,
                                                                                    tile + i * kTileRow + j);
        }
      } else {
        for (int64_t i = 0; i < rows; i += kGroup) {
          multiply_registers<kWidth, kGroup, 1, 1, kGroup, kPanel, kTileRow, false>(a + i / kGroup * a_group, b, steps,
                                                                                    tile + i * kTileRow + j);
        }
      }
    }
  }

  // C (rows, dim) += Tile B: B (keys, dim) and C in Panels.
  FASTGEN_HOST_DEVICE static void add_product(const float* tile, int64_t rows, int64_t keys, const float* b,
                                              int64_t b_panel, int64_t dim, float* c, int64_t c_panel, bool ahead) {
    const int64_t share = share_of(kTile * kPanel, rows, ahead);
    int64_t d = 0;
    for (; d + kWidth < dim; d += kPanel, b += b_panel, c += c_panel) {
      const float* next = b + kTile * kPanel;
      for (int64_t i = 0; i < rows; i += kGroup, next += share) {
        prefetch(next, share);
        multiply_registers<kWidth, kGroup, 2, kTileRow, 1, kPanel, kPanel, true>(tile + i * kTileRow, b, keys,
                                                                                 c + i * kPanel);
      }
    }
    if (d >= dim) return;
    int64_t i = 0;
    for (; i + kRowStep <= rows; i += kRowStep) {
      multiply_registers<kWidth, kRowStep, 1, kTileRow, 1, kPanel, kPanel, true>(tile + i * kTileRow, b, keys,
                                                                                 c + i * kPanel);
    }
    for (; i < rows; i += kGroup) {
      multiply_registers<kWidth, kGroup, 1, kTileRow, 1, kPanel, kPanel, true>(tile + i * kTileRow, b, keys,
                                                                               c + i * kPanel);
    }
  }

  // C (keys, dim) += Tile^T B: B (rows, dim) and C in Panels. A few keys of the tile stay in L1 for all of B.
  FASTGEN_HOST_DEVICE static void add_transposed(const float* tile, int64_t rows, int64_t keys, const float* b,
                                                 int64_t b_panel, int64_t dim, float* c, int64_t c_panel, bool ahead) {
    for (int64_t j = 0; j < keys; j += kRowStep, tile += kRowStep, c += kRowStep * kPanel) {
      const float* panel = b;
      float* target = c;
      int64_t d = 0;
      for (; d + kWidth < dim; d += kPanel, panel += b_panel, target += c_panel) {
        if (ahead) prefetch(target + kTile * kPanel, kRowStep * kPanel);
        for (int64_t i = 0; i < kRowStep && j + i < keys; i += kGroup) {
          multiply_registers<kWidth, kGroup, 2, 1, kTileRow, kPanel, kPanel, true>(tile + i, panel, rows,
                                                                                   target + i * kPanel);
        }
      }
      if (d < dim) {
        multiply_registers<kWidth, kRowStep, 1, 1, kTileRow, kPanel, kPanel, true>(tile, panel, rows, target);
      }
    }
  }

  // (rows, dim) times factor to Groups, with zeros up to ``padded`` rows; group g starts at to + g * to_group.
  FASTGEN_HOST_DEVICE static void pack_groups(const float* from, int64_t stride, int64_t rows, int64_t padded,
                                              int64_t dim, float factor, float* to, int64_t to_group) {
    for (int64_t i = 0; i < padded; i += kGroup, from += kGroup * stride, to += to_group) {
      const int64_t count = std::min<int64_t>(kGroup, rows - i);
      int64_t d = 0;
      for (; count == kGroup && d + 8 <= dim; d += 8) {
        constexpr int kFirst = kGroup < 8 ? kGroup : 8, kRest = kGroup - kFirst;
        copy_columns<kFirst>(from + d, stride, factor, to + d * kGroup);
        if constexpr (kRest > 0) copy_columns<kRest>(from + 8 * stride + d, stride, factor, to + d * kGroup + 8);
      }
      for (; d < dim; ++d) {
        for (int64_t r = 0; r < kGroup; ++r) to[d * kGroup + r] = r < count ? from[r * stride + d] * factor : 0.0f;
      }
    }
  }

  // 8 columns of kRows rows, times factor, to columns kGroup apart.
  template <int kRows>
  FASTGEN_HOST_DEVICE static void copy_columns(const float* from, int64_t stride, float factor, float* to) {
    Vector<8> columns[8];
    load_columns<kRows>(from, stride, columns);
    FASTGEN_UNROLL
    for (int c = 0; c < 8; ++c) {
      columns[c] *= factor;
      memcpy(to + c * kGroup, &columns[c], kRows * sizeof(float));
    }
  }

  // (rows, dim) times factor to Panels of ``panel_rows`` rows, with zeros up to ``filled`` rows.
  FASTGEN_HOST_DEVICE static void pack_panels(const float* from, int64_t stride, int64_t rows, int64_t filled,
                                              int64_t panel_rows, int64_t dim, float factor, float* to) {
    for (int64_t d = 0; d < dim; d += kPanel, to += panel_rows * kPanel) {
      const int64_t width = std::min<int64_t>(kPanel, dim - d);
      if (width == kPanel) {
        for (int64_t i = 0; i < rows; ++i) {
          FASTGEN_UNROLL
          for (int v = 0; v < 2; ++v) {
            reinterpret_cast<Vector<kWidth>*>(to + i * kPanel)[v] =
                reinterpret_cast<const Vector<kWidth>*>(from + i * stride + d)[v] * factor;
          }
        }
      } else {
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t c = 0; c < kPanel; ++c)
            to[i * kPanel + c] = c < width ? from[i * stride + d + c] * factor : 0.0f;
        }
      }
      std::fill(to + rows * kPanel, to + filled * kPanel, 0.0f);
    }
  }

  // (rows, dim) times factor, transposed to Panels of (dim, rows), ``to_panel`` apart, with zeros in the last panel.
  FASTGEN_HOST_DEVICE static void pack_transposed(const float* from, int64_t stride, int64_t rows, int64_t dim,
                                                  float factor, float* to, int64_t to_panel) {
    for (int64_t j = 0; j < rows; j += kPanel, to += to_panel) {
      // The second vector of a panel is read only if it has keys.
      const int64_t end = rows - j > kWidth ? kPanel : round_up(kWidth, 8);
      for (int64_t first = 0; first < end; first += 8) {
        int64_t d = 0;
        for (; j + first + 8 <= rows && d + 8 <= dim; d += 8) {
          Vector<8> columns[8];
          load_columns<8>(from + (j + first) * stride + d, stride, columns);
          FASTGEN_UNROLL
          for (int c = 0; c < 8; ++c)
            *reinterpret_cast<Vector<8>*>(to + (d + c) * kPanel + first) = columns[c] * factor;
        }
        if (d == dim) continue;
        const int64_t count = std::clamp<int64_t>(rows - j - first, 0, 8);
        for (; d < dim; ++d) {
          float* __restrict__ column = to + d * kPanel + first;
          for (int64_t i = 0; i < count; ++i) column[i] = from[(j + first + i) * stride + d] * factor;
          for (int64_t i = count; i < 8; ++i) column[i] = 0.0f;
        }
      }
    }
  }

  // (rows, dim) of Panels of ``padded`` rows, times factor, to rows ``stride`` apart.
  FASTGEN_HOST_DEVICE static void unpack_panels(const float* from, int64_t padded, int64_t rows, int64_t dim,
                                                float factor, float* to, int64_t stride) {
    for (int64_t d = 0; d < dim; d += kPanel, from += padded * kPanel) {
      const int64_t width = std::min<int64_t>(kPanel, dim - d);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t c = 0; c < width; ++c) to[i * stride + d + c] = from[i * kPanel + c] * factor;
      }
    }
  }
};

}  // namespace fastgen::cpu
