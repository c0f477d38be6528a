// Parallel over (key head, part): a part is every parts-th tile of the head's query rows.
//
//   keys in Panels, for the products of both kinds; gradients of the part's keys = 0
//   for each tile of query rows
//     for each block of kTile keys      S = Q K^T, W = Gq K^T + Q Gk^T
//                                       P = e^(S - lse), Y = P (W - shift), sums of the rows
//                                       O' += Y V + P Gv
//     for each row                      w = shift + rowsum(Y), O' -= (w - shift) O, r = rowsum(dO O')
//     for each block of kTile keys      dP = dO V^T, C = dO Gv^T
//                                       Pt = Y - P (w - shift), dS = P (dP - delta), dS2 = Pt (dP - delta) + P (C - r)
//                                       dV += Pt^T dO, dK += dS2^T Q + dS^T Gq, dQ += dS2 K + dS Gk
//   epilogue: dK, dV = sums over the parts, in a fixed order
//
// Pt V = Y V - (w - shift) P V, and P V is O: the rows of O' need w, a sum over all keys, only at their end. The
// gradients of keys need it before, so P and Y of all keys of a tile are kept: a tile has as many rows as keep them in
// L2, or most of them. The tangent alone keeps one block.
#include "attention/cpu/second_order.h"

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <type_traits>

#include "attention/cpu/key_sums.h"
#include "attention/cpu/memory.h"
#include "attention/cpu/products.h"
#include "attention/cpu/second_order_rows.h"
#include "common/cpu/levels.h"
#include "common/math.h"

namespace fastgen::cpu {
namespace {

constexpr int64_t kMatrixBytes = 2 * 1024 * 1024;  // of the matrices that a tile keeps
constexpr int64_t kMostRows = 96;

// State shared by all tasks.
struct Shared {
  const SecondOrderParams& p;
  bool grads, cross;    // second order; with a tangent of the value
  int64_t rows, tiles;  // of queries: rows of a tile, tiles of a head
  int64_t parts;        // of a key head
  int64_t padded_keys;  // whole blocks
  const KeySums* sums;  // of the second order

  FASTGEN_HOST_DEVICE const Problem& problem() const { return p.problem; }
  int64_t matrices() const { return 2 + (p.problem.seeds != nullptr); }  // of scores that are kept
};

// Memory of one thread.
template <int kWidth, int kGroup>
struct Workspace {
  using Product = Products<kWidth, kGroup>;
  // K^T and V^T, each followed by its tangent in every panel; K, V and their tangents.
  float *keys_across, *values_across, *keys, *tangent_keys, *values, *tangent_values;
  // Rows in Groups: tangent and query; grad_out. In Panels: query, tangent, grad_out.
  float *row_groups, *grad_groups, *queries, *tangent_queries, *grad_out;
  float *tangent_out, *grad_queries;  // in Panels
  float *scores, *direction, *keep;   // (blocks, rows, kTileRow) with gradients, else one block
  float *grads, *cross;               // one block, (rows, kTileRow); with dropout, also P keep and Y keep
  float *lse, *delta;
  RowSums<kWidth>* sums;
  RowResults* row;
  int64_t size;

  FASTGEN_HOST_DEVICE Workspace(const Shared& s, float* memory) {
    const Problem& p = s.problem();
    const int64_t key = Product::panels_size(1, p.key_dim), value = Product::panels_size(1, p.value_dim);
    const int64_t keys_all = s.padded_keys, tile = s.rows * kTileRow;
    const int64_t matrix = s.grads ? s.padded_keys / kTile * tile : tile;
    Cutter cut(memory);
    keys_across = cut.take(keys_all * 2 * p.key_dim), values_across = cut.take(keys_all * 2 * p.value_dim);
    keys = cut.take(keys_all * key), tangent_keys = cut.take(keys_all * key);
    values = cut.take(keys_all * value), tangent_values = cut.take(keys_all * value);
    row_groups = cut.take(s.rows * 2 * p.key_dim), grad_groups = cut.take(s.rows * p.value_dim);
    queries = cut.take(s.rows * key), tangent_queries = cut.take(s.rows * key);
    grad_out = cut.take(s.rows * value), tangent_out = cut.take(s.rows * value), grad_queries = cut.take(s.rows * key);
    scores = cut.take(matrix), direction = cut.take(matrix);
    keep = p.seeds != nullptr ? cut.take(matrix) : nullptr;
    grads = s.grads ? cut.take(tile) : nullptr, cross = s.grads ? cut.take(tile) : nullptr;
    lse = cut.take(s.rows), delta = cut.take(s.rows);
    sums = cut.template take_of<RowSums<kWidth>>(s.rows), row = cut.template take_of<RowResults>(s.rows);
    size = cut.used();
  }
};

// One tile: ``rows`` query rows from ``first`` on, and all keys that they attend to.
template <int kWidth, int kGroup>
struct TileOfRows {
  using Product = Products<kWidth, kGroup>;
  static constexpr int kPanel = Product::kPanel;
  const Shared& s;
  const Workspace<kWidth, kGroup>& w;
  int64_t batch, head, first, rows, padded, first_block, blocks, stride;

  FASTGEN_HOST_DEVICE TileOfRows(const Shared& shared, const Workspace<kWidth, kGroup>& workspace, int64_t b, int64_t h,
                                 int64_t start)
      : s(shared), w(workspace), batch(b), head(h), first(start) {
    const Problem& p = s.problem();
    rows = std::min(s.rows, p.queries - first), padded = round_up(rows, kGroup),
    stride = s.grads ? s.rows * kTileRow : 0;
    const int64_t begin = p.first_key(first), end = p.end_key(first + rows - 1);
    first_block = begin / kTile, blocks = std::max<int64_t>(0, ceil_div(end, kTile) - first_block);
  }

  FASTGEN_HOST_DEVICE int64_t keys_of(int64_t block) const {
    return std::min<int64_t>(kTile, s.problem().keys - (first_block + block) * kTile);
  }

  FASTGEN_HOST_DEVICE void load_rows() const {
    const Problem& p = s.problem();
    const int64_t dim = p.key_dim, group = 2 * dim * kGroup;
    const auto load = [&](const Operand& from, float* groups, float* panels) __attribute__((always_inline)) {
      if (from.data == nullptr) return;
      const float* data = from.at(batch, head, first);
      Product::pack_groups(data, from.strides[2], rows, padded, dim, p.scale, groups, group);
      if (s.grads) Product::pack_panels(data, from.strides[2], rows, padded, padded, dim, p.scale, panels);
    };
    load(s.p.tangent_query, w.row_groups, w.tangent_queries);
    load(p.query, w.row_groups + dim * kGroup, w.queries);
    std::fill_n(w.tangent_out, Product::panels_size(padded, p.value_dim), 0.0f);
    std::fill_n(w.sums, rows, RowSums<kWidth>());
    for (int64_t i = 0; i < rows; ++i) w.lse[i] = row_lse(s.p.lse, batch, head, first + i);
    if (!s.grads) return;
    std::fill_n(w.grad_queries, Product::panels_size(padded, dim), 0.0f);
    const Operand &grad = s.p.grad_out, &out = s.p.out;
    Product::pack_groups(grad.at(batch, head, first), grad.strides[2], rows, padded, p.value_dim, 1.0f, w.grad_groups,
                         p.value_dim * kGroup);
    Product::pack_panels(grad.at(batch, head, first), grad.strides[2], rows, padded, padded, p.value_dim, 1.0f,
                         w.grad_out);
    for (int64_t i = 0; i < rows; ++i) {
      w.delta[i] = row_delta(p, grad, out, s.p.grad_lse, batch, head, first + i);
    }
  }

  struct Scores {
    const float *rows, *keys;     // in Groups and in Panels
    int64_t group, panel, steps;  // steps: 0 without a direction; two products that are added are one
    float* matrix;
  };
  template <int kCount>
  FASTGEN_HOST_DEVICE void multiply_to_scores(const Scores (&all)[kCount], int64_t count, int64_t block) const {
    for (int64_t i = 0; i < count; ++i) {  // a loop, since every product is inlined
      const Scores& one = all[i];
      Product::scores(one.rows, one.group, padded, one.keys, one.panel, keys_of(block), one.steps, one.matrix,
                      block + 1 < blocks);
    }
  }

  FASTGEN_HOST_DEVICE void multiply_to_scores(int64_t block) const {
    const int64_t dim = s.problem().key_dim, group = 2 * dim * kGroup, panel = 2 * dim * kPanel;
    const bool of_query = s.p.tangent_query.data != nullptr, of_key = s.p.tangent_key.data != nullptr;
    const float* across = w.keys_across + (first_block + block) * kTile * 2 * dim;
    const int64_t first_part = of_query ? 0 : dim;
    const Scores all[] = {
        {w.row_groups + dim * kGroup, across, group, panel, dim, w.scores + block * stride},
        {w.row_groups + first_part * kGroup, across + first_part * kPanel, group, panel, (of_query + of_key) * dim,
         w.direction + block * stride},
    };
    multiply_to_scores(all, 2, block);
  }

  FASTGEN_HOST_DEVICE void multiply_to_grads(int64_t block) const {
    const int64_t wide = s.problem().value_dim, group = wide * kGroup, panel = 2 * wide * kPanel;
    const float* values = w.values_across + (first_block + block) * kTile * 2 * wide;
    const Scores all[] = {{w.grad_groups, values, group, panel, wide, w.grads},
                          {w.grad_groups, values + wide * kPanel, group, panel, wide, w.cross}};
    multiply_to_scores(all, s.cross ? 2 : 1, block);
  }

  // Keys of a block that row i attends to, relative to the block.
  struct Range {
    int64_t begin, end;
  };
  FASTGEN_HOST_DEVICE Range attended(int64_t block, int64_t i) const {
    const Problem& p = s.problem();
    const int64_t key = (first_block + block) * kTile;
    const int64_t begin = std::clamp<int64_t>(p.first_key(first + i) - key, 0, kTile);
    return {begin, std::clamp<int64_t>(p.end_key(first + i) - key, begin, kTile)};
  }

  FASTGEN_HOST_DEVICE static void clear_others(const Range& range, float* row, float value) {
    std::fill_n(row, range.begin, value), std::fill(row + range.end, row + kTile, value);
  }

  // Masks row i of a block. At keys that it does not attend to, the other matrices are zeros.
  FASTGEN_HOST_DEVICE void mask_row(int64_t block, int64_t i) const {
    const Problem& p = s.problem();
    const int64_t row = first + i, key = (first_block + block) * kTile, at = block * stride + i * kTileRow;
    const Range range = attended(block, i);
    const int64_t from = range.begin, count = range.end - range.begin;
    if (p.mask) p.mask.apply(batch, head, row, key + from, count, w.scores + at + from);
    if (s.p.tangent_mask) s.p.tangent_mask.apply(batch, head, row, key + from, count, w.direction + at + from);
    if (w.keep != nullptr) {
      const int64_t keys = keys_of(block);
      p.keep_row(batch, head, row, key, key + keys, w.keep + at);
      std::fill(w.keep + at + keys, w.keep + at + kTile, 0.0f);
    }
    if (count == kTile) return;
    clear_others(range, w.scores + at, -kInfinity), clear_others(range, w.direction + at, 0.0f);
  }

  // Where O' takes P and Y from.
  FASTGEN_HOST_DEVICE float* dropped_scores(int64_t block) const {
    return w.keep != nullptr && s.grads ? w.grads : w.scores + block * stride;
  }
  FASTGEN_HOST_DEVICE float* dropped_direction(int64_t block) const {
    return w.keep != nullptr && s.grads ? w.cross : w.direction + block * stride;
  }

  FASTGEN_HOST_DEVICE void begin_rows(int64_t block) const {
    const int64_t width = written_width(keys_of(block));
    const auto row_of = [&](int64_t i) __attribute__((always_inline)) {
      const int64_t at = block * stride + i * kTileRow;
      return FirstRow{w.scores + at,
                      w.direction + at,
                      w.keep == nullptr ? nullptr : w.keep + at,
                      dropped_scores(block) + i * kTileRow,
                      dropped_direction(block) + i * kTileRow,
                      width};
    };
    for (int64_t i = 0; i < rows; ++i) mask_row(block, i);
    if (w.keep == nullptr) {
      for (int64_t i = 0; i < rows; ++i) begin_row<kWidth, false>(row_of(i), w.lse[i], w.sums[i]);
    } else {
      for (int64_t i = 0; i < rows; ++i) begin_row<kWidth, true>(row_of(i), w.lse[i], w.sums[i]);
    }
    for (float* matrix : {dropped_scores(block), dropped_direction(block)}) clear_rows_past_end(matrix);
  }

  FASTGEN_HOST_DEVICE void clear_rows_past_end(float* matrix) const {
    std::fill(matrix + rows * kTileRow, matrix + padded * kTileRow, 0.0f);
  }

  FASTGEN_HOST_DEVICE void finish_rows() const {
    const Problem& p = s.problem();
    for (int64_t i = 0; i < rows; ++i) {
      RowResults& row = w.row[i];
      row = finish_row<kWidth>(w.sums[i]);
      const float* __restrict__ out = s.p.out.at(batch, head, first + i);
      Vector<kWidth> second = {};
      for (int64_t d = 0; d < p.value_dim; d += kPanel) {
        float* __restrict__ tangent = w.tangent_out + d * padded + i * kPanel;
        const int64_t width = std::min<int64_t>(kPanel, p.value_dim - d);
        if (width == kPanel) {
          for (int64_t c = 0; c < kPanel; ++c) tangent[c] = tangent[c] * row.inverse - out[d + c] * row.offset;
        } else {
          for (int64_t c = 0; c < width; ++c) tangent[c] = tangent[c] * row.inverse - out[d + c] * row.offset;
        }
        if (!s.grads) continue;
        const float* grad = w.grad_out + d * padded + i * kPanel;
        second += vector_at<kWidth>(tangent) * vector_at<kWidth>(grad);
        second += vector_at<kWidth>(tangent + kWidth) * vector_at<kWidth>(grad + kWidth);
      }
      row.second = fold<kWidth, true>(second);
    }
  }

  FASTGEN_HOST_DEVICE void end_rows(int64_t block) const {
    const int64_t width = written_width(keys_of(block));
    const auto run = [&](auto keep, auto cross) __attribute__((always_inline)) {
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = block * stride + i * kTileRow;
        const SecondRow row{w.scores + at,          w.keep == nullptr ? nullptr : w.keep + at,
                            w.direction + at,       w.grads + i * kTileRow,
                            w.cross + i * kTileRow, width};
        end_row<kWidth, keep.value, cross.value>(row, w.row[i], w.delta[i]);
      }
    };
    for (int64_t i = 0; i < rows; ++i) {
      const Range range = attended(block, i);
      if (range.begin == 0 && range.end == kTile) continue;
      clear_others(range, w.grads + i * kTileRow, 0.0f);
      if (s.cross) clear_others(range, w.cross + i * kTileRow, 0.0f);
    }
    constexpr std::true_type yes;
    constexpr std::false_type no;
    if (w.keep == nullptr) {
      s.cross ? run(no, yes) : run(no, no);
    } else {
      s.cross ? run(yes, yes) : run(yes, no);
    }
    for (float* matrix : {w.direction + block * stride, w.grads, w.cross}) clear_rows_past_end(matrix);
  }

  struct Sum {
    bool present;
    const float *tile, *b;
    float* c;
    int64_t dim;
  };
  // C += Tile B
  FASTGEN_HOST_DEVICE void add_to_rows(const Sum (&all)[2], int64_t block) const {
    for (const Sum& one : all) {
      if (!one.present) continue;
      Product::add_product(one.tile, padded, keys_of(block), one.b, s.padded_keys * kPanel, one.dim, one.c,
                           padded * kPanel, block + 1 < blocks);
    }
  }

  FASTGEN_HOST_DEVICE void add_tangent_out(int64_t block) const {
    const int64_t key = (first_block + block) * kTile * kPanel, wide = s.problem().value_dim;
    add_to_rows(
        {{true, dropped_direction(block), w.values + key, w.tangent_out, wide},
         {s.p.tangent_value.data != nullptr, dropped_scores(block), w.tangent_values + key, w.tangent_out, wide}},
        block);
  }

  FASTGEN_HOST_DEVICE void add_grads(int64_t block, float* grad_keys, float* grad_values) const {
    const int64_t key = (first_block + block) * kTile * kPanel;
    const int64_t dim = s.problem().key_dim, wide = s.problem().value_dim;
    const bool of_query = s.p.tangent_query.data != nullptr, of_key = s.p.tangent_key.data != nullptr;
    add_to_rows({{true, w.cross, w.keys + key, w.grad_queries, dim},
                 {of_key, w.grads, w.tangent_keys + key, w.grad_queries, dim}},
                block);
    const Sum of_keys[] = {
        {true, w.direction + block * stride, w.grad_out, grad_values + key, wide},
        {true, w.cross, w.queries, grad_keys + key, dim},
        {of_query, w.grads, w.tangent_queries, grad_keys + key, dim},
    };
    for (const Sum& one : of_keys) {
      if (!one.present) continue;
      Product::add_transposed(one.tile, padded, keys_of(block), one.b, padded * kPanel, one.dim, one.c,
                              s.padded_keys * kPanel, block + 1 < blocks);
    }
  }

  FASTGEN_HOST_DEVICE void store_rows() const {
    const Problem& p = s.problem();
    const Result &out = s.p.tangent_out, &grad = s.p.grad_query;
    Product::unpack_panels(w.tangent_out, padded, rows, p.value_dim, 1.0f, out.at(batch, head, first), out.strides[2]);
    for (int64_t i = 0; i < rows; ++i) *s.p.tangent_lse.at(batch, head, first + i) = w.row[i].mean;
    if (!s.grads) return;
    Product::unpack_panels(w.grad_queries, padded, rows, p.key_dim, p.scale, grad.at(batch, head, first),
                           grad.strides[2]);
  }
};

template <int kWidth, int kGroup>
FASTGEN_HOST_DEVICE void load_keys(const Shared& s, const Workspace<kWidth, kGroup>& w, int64_t batch, int64_t head) {
  using Product = Products<kWidth, kGroup>;
  constexpr int kPanel = Product::kPanel;
  const Problem& p = s.problem();
  const auto load = [&](const Operand& from, int64_t dim, float* across, float* along) __attribute__((always_inline)) {
    if (from.data == nullptr) return;
    const float* data = from.at(batch, head, 0);
    if (across != nullptr) Product::pack_transposed(data, from.strides[2], p.keys, dim, 1.0f, across, 2 * dim * kPanel);
    if (along != nullptr) Product::pack_panels(data, from.strides[2], p.keys, p.keys, s.padded_keys, dim, 1.0f, along);
  };
  load(p.key, p.key_dim, w.keys_across, s.grads ? w.keys : nullptr);
  load(s.p.tangent_key, p.key_dim, w.keys_across + p.key_dim * kPanel, s.grads ? w.tangent_keys : nullptr);
  load(p.value, p.value_dim, s.grads ? w.values_across : nullptr, w.values);
  load(s.p.tangent_value, p.value_dim, s.grads ? w.values_across + p.value_dim * kPanel : nullptr, w.tangent_values);
}

template <int kWidth, int kGroup>
FASTGEN_HOST_DEVICE int64_t workspace_size(const Shared& s) {
  return Workspace<kWidth, kGroup>(s, nullptr).size;
}

// ``load``: the memory does not hold the operands of these keys, which the parts of a head have in common.
template <int kWidth, int kGroup>
FASTGEN_HOST_DEVICE void run_part(const Shared& s, float* memory, bool load, int64_t batch, int64_t key_head,
                                  int64_t part) {
  const Problem& p = s.problem();
  const Workspace<kWidth, kGroup> w(s, memory);
  if (load) load_keys<kWidth, kGroup>(s, w, batch, key_head);
  float *grad_keys = nullptr, *grad_values = nullptr;
  if (s.grads) {
    grad_keys = s.sums->of(batch, key_head, part);
    grad_values = grad_keys + Products<kWidth, kGroup>::panels_size(s.padded_keys, p.key_dim);
    std::fill_n(grad_keys, s.sums->size, 0.0f);
  }
  const int64_t groups = p.heads / p.key_heads;
  for (int64_t item = part; item < groups * s.tiles; item += s.parts) {
    const TileOfRows<kWidth, kGroup> tile(s, w, batch, key_head * groups + item / s.tiles, item % s.tiles * s.rows);
    tile.load_rows();
    for (int64_t block = 0; block < tile.blocks; ++block) {
      tile.multiply_to_scores(block);
      tile.begin_rows(block);
      tile.add_tangent_out(block);
    }
    tile.finish_rows();
    for (int64_t block = 0; s.grads && block < tile.blocks; ++block) {
      tile.multiply_to_grads(block);
      tile.end_rows(block);
      tile.add_grads(block, grad_keys, grad_values);
    }
    tile.store_rows();
  }
}

template <int kWidth, int kGroup>
FASTGEN_HOST_DEVICE void store_keys(const Shared& s, int64_t batch, int64_t key_head, int64_t first, int64_t rows) {
  store_key_sums<Products<kWidth, kGroup>>(*s.sums, s.problem(), s.p.grad_key, s.p.grad_value, batch, key_head, first,
                                           rows);
}

void run(const SecondOrderParams& params, bool grads) {
  const Problem& p = params.problem;
  const int64_t key_heads = p.batch * p.key_heads;
  Shared s{params, grads, grads && params.tangent_value.data != nullptr, 0, 0, 0, round_up(p.keys, kTile), nullptr};
  const int64_t row_bytes = s.matrices() * s.padded_keys / kTile * kTileRow * static_cast<int64_t>(sizeof(float));
  const int64_t fit = grads ? kMatrixBytes / row_bytes / kRowStep * kRowStep : kMostRows;
  const int64_t most = std::clamp<int64_t>(fit, kRowStep, kMostRows);
  s.rows = p.tile_rows(most, kRowStep);
  s.tiles = ceil_div(p.queries, s.rows);
  s.parts = parts_of(p, p.heads / p.key_heads * s.tiles);
  const auto part = for_level<run_part<4, kGenericGroup>, run_part<8, 6>, run_part<16, 12>>();
  const auto store = for_level<store_keys<4, kGenericGroup>, store_keys<8, 6>, store_keys<16, 12>>();
  const int64_t workspace =
      for_level<workspace_size<4, kGenericGroup>, workspace_size<8, 6>, workspace_size<16, 12>>()(s);
  std::optional<KeySums> sums;
  if (grads) s.sums = &sums.emplace(p, s.parts);
  torch::stable::parallel_for(0, key_heads * s.parts, 1, [&](int64_t begin, int64_t end) {
    const Memory memory = allocate(workspace);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / s.parts;
      const bool load = item == begin || item % s.parts == 0;
      part(s, memory.get(), load, head / p.key_heads, head % p.key_heads, item % s.parts);
    }
  });
  if (!grads) return;
  const int64_t blocks = s.padded_keys / kTile;
  torch::stable::parallel_for(0, key_heads * blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / blocks, first = item % blocks * kTile;
      store(s, head / p.key_heads, head % p.key_heads, first, std::min<int64_t>(kTile, p.keys - first));
    }
  });
}

}  // namespace

void attention_tangent(const SecondOrderParams& params) { run(params, false); }

void attention_second_order(const SecondOrderParams& params) { run(params, true); }

}  // namespace fastgen::cpu
