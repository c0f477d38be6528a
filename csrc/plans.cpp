// Launch plans, for fastgen.backend.plans: integers in, JSON text out. No tensors, no CUDA.
//
// Each function returns text that stays valid until the thread calls the same function again. Sizes without a plan
// give {"error": reason}.
#include <cstdint>
#include <sstream>
#include <string>

#include "attention/decode_plan.h"
#include "attention/one_head.h"
#include "attention/one_tile.h"
#include "attention/plan.h"
#include "attention/sm90/backward_plan.h"
#include "attention/sm90/plan.h"
#include "attention/sm90/tangent_plan.h"
#include "attention/sm90/wide_plan.h"
#include "common/exported.h"
#include "latent/plan.h"
#include "projection/plan.h"

namespace {

// A JSON object, built up by its members.
class Object {
 public:
  template <typename T>
  Object& add(const char* name, const T& value) {
    if (!first_) text_ << ", ";
    first_ = false;
    text_ << '"' << name << "\": " << value;
    return *this;
  }
  Object& add(const char* name, const Object& value) { return add(name, value.text()); }
  Object& add_pair(const char* name, int first, int second) { return add(name, pair(first, second)); }
  std::string text() const { return "{" + text_.str() + "}"; }

  static std::string pair(int first, int second) {
    return "[" + std::to_string(first) + ", " + std::to_string(second) + "]";
  }

 private:
  std::ostringstream text_;
  bool first_ = true;
};

// owns_queries: blocks own BLOCK_M queries and iterate over BLOCK_N keys, otherwise the other way round.
Object describe(const fastgen::attention::Plan& plan, bool owns_queries = true) {
  Object result;
  result.add_pair("tile", plan.dims.key, plan.dims.value)
      .add("warps", plan.warps)
      .add("block_m", owns_queries ? plan.owned : plan.iterated)
      .add("block_n", owns_queries ? plan.iterated : plan.owned)
      .add("tiles_per_block", plan.tiles_per_block)
      .add("blocks", plan.blocks)
      .add("slices", plan.slices)
      .add("shared_bytes", plan.shared_bytes);
  if (plan.splits > 1) result.add("splits", plan.splits);
  if (plan.stages > 0) result.add("stages", plan.stages);
  return result;
}

Object describe(const fastgen::projection::Plan& plan) {
  const fastgen::projection::TileShape& tile = fastgen::projection::kTileShapes[plan.tile];
  Object result;
  result.add_pair("tile", tile.block_m, tile.block_n)
      .add("warps", tile.threads() / 32)
      .add("blocks", plan.row_tiles * plan.column_tiles * plan.splits)
      .add("splits", plan.splits);
  return result;
}

template <typename... Tables>
std::string pairs(const Tables&... tables) {
  std::string text;
  const auto add = [&](const auto& table) {
    for (const auto& dims : table) text += (text.empty() ? "[" : ", ") + Object::pair(dims.key, dims.value);
  };
  (add(tables), ...);
  return text + "]";
}

}  // namespace

// Plan of the latent kernels for a (rows, cols) latent.
FASTGEN_EXPORTED const char* fastgen_latent_plan(int64_t rows, int64_t cols, int element_size, int multiprocessors) {
  const auto plan = fastgen::latent::make_plan(rows, cols, element_size, multiprocessors);
  thread_local std::string text;
  text = Object()
             .add("threads_per_row", plan.threads_per_row)
             .add("rows_per_block", plan.rows_per_block)
             .add("row_blocks", plan.row_blocks)
             .add("splits", plan.splits)
             .text();
  return text.c_str();
}

// Head dims (key, value) of the compiled attention kernels; second_order: of tangents and second derivatives.
FASTGEN_EXPORTED const char* fastgen_attention_tiles(bool second_order) {
  thread_local std::string text;
  namespace attention = fastgen::attention;
  text = second_order ? pairs(attention::kSecondOrderHeadDims, attention::kWideSecondOrderHeadDims)
                      : pairs(attention::kHeadDims);
  return text.c_str();
}

// Plan of each attention kernel. plain: no mask, dropout or softcap; mask: the four sizes of a mask that requires a
// gradient, or null; shared_limit: the GPU's maximum of a block, in bytes.
FASTGEN_EXPORTED const char* fastgen_attention_plan(int64_t batch, int64_t heads, int64_t key_heads, int64_t queries,
                                                    int64_t keys, int key_dim, int value_dim, int element_size,
                                                    int multiprocessors, int shared_limit, bool plain,
                                                    const int* mask) {
  namespace attention = fastgen::attention;
  const attention::Dims dims = {key_dim, value_dim};
  if (attention::find_head_dims(attention::kHeadDims, dims) < 0) {
    return R"({"error": "key_dim, value_dim: larger than every compiled tile"})";
  }
  const attention::Sizes sizes = {batch, heads, key_heads, queries, keys, key_dim, value_dim, element_size, plain};
  const attention::Gpu gpu = {multiprocessors, shared_limit};
  if (shared_limit < fastgen::kSharedLimit) {
    return R"({"error": "shared_limit: less than every GPU from sm_80 on has"})";
  }
  Object result;
  result.add("forward", describe(attention::forward_plan(sizes, gpu)));
  if (attention::is_decode(sizes, false)) {
    result.add("decode", describe(attention::decode_plan(sizes, multiprocessors)));
  }
  if (attention::sm90::refusal(sizes) == nullptr && shared_limit >= fastgen::kSharedLimit90) {
    result.add("forward sm90", describe(attention::sm90::forward_plan(sizes, multiprocessors)));
  }
  if (attention::sm90::wide_refusal(sizes) == nullptr && shared_limit >= fastgen::kSharedLimit90) {
    result.add("forward wide sm90", describe(attention::sm90::wide_forward_plan90(sizes, gpu)));
  }
  if (attention::sm90::backward_refusal(sizes) == nullptr && shared_limit >= fastgen::kSharedLimit90) {
    result.add("query sm90", describe(attention::sm90::backward_plan(sizes, false, multiprocessors)));
    result.add("key_value sm90", describe(attention::sm90::backward_plan(sizes, true, multiprocessors), false));
  }
  result.add("query", describe(attention::backward_query_plan(sizes, gpu)));
  result.add("key_value", describe(attention::backward_key_value_plan(sizes, gpu), false));
  const attention::OneTilePlan one_tile = attention::one_tile_plan(sizes, false);
  const attention::OneHeadPlan one_head = attention::one_head_plan(sizes, gpu);
  if (one_tile.entry >= 0) result.add("one tile", describe(one_tile.plan));
  if (one_head.taken && one_tile.entry < 0) result.add("one head", describe(one_head.plan, false));
  result.add("tangent", describe(attention::tangent_plan(sizes, gpu)));
  if (attention::sm90::tangent_refusal(sizes) == nullptr && shared_limit >= fastgen::kSharedLimit90) {
    result.add("tangent sm90", describe(attention::sm90::tangent_plan90(sizes, multiprocessors)));
  }
  if (attention::sm90::forward_tangent_refusal(sizes) == nullptr && shared_limit >= fastgen::kSharedLimit90) {
    result.add("forward tangent sm90", describe(attention::sm90::forward_tangent_plan(sizes, multiprocessors)));
  }
  result.add("second order query", describe(attention::second_order_query_plan(sizes, gpu)));
  result.add("second order key_value", describe(attention::second_order_key_value_plan(sizes, gpu), false));
  if (mask != nullptr) {
    const int sizes_of_mask[4] = {mask[0], mask[1], mask[2], mask[3]};
    const auto with_mask = attention::one_tile_mask_plan(sizes, false, sizes_of_mask, multiprocessors);
    if (with_mask.entry >= 0) result.add("one tile mask", describe(with_mask.plan));
    result.add("mask", describe(attention::mask_plan(sizes, sizes_of_mask, multiprocessors, false)));
    result.add("second order mask", describe(attention::mask_plan(sizes, sizes_of_mask, multiprocessors, true)));
  }
  thread_local std::string text;
  text = result.text();
  return text.c_str();
}

// Plan of each projection kernel. batch: 1 if tokens are numbered across the batch; widest: largest head dim that must
// be in one tile.
FASTGEN_EXPORTED const char* fastgen_projection_plan(int batch, int tokens, int inputs, int outputs, int widest,
                                                     int element_size, int multiprocessors) {
  namespace projection = fastgen::projection;
  const projection::Tokens shape = {batch, tokens, tokens};
  Object result;
  result.add("forward", describe(projection::project_plan(shape, outputs, widest, multiprocessors)));
  result.add("input gradient", describe(projection::project_plan(shape, inputs, 1, multiprocessors)));
  result.add("weight gradient",
             describe(projection::gradient_plan(shape, outputs, inputs, element_size, multiprocessors)));
  thread_local std::string text;
  text = result.text();
  return text.c_str();
}
