// fastgen._C: build information and launch plans. It handles no tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "attention/plan.h"
#include "latent/plan.h"
#include "projection/plan.h"

namespace py = pybind11;

namespace {

std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> result;
  for (std::string word; stream >> word;) result.push_back(word);
  return result;
}

py::dict build_info() {
  py::dict info;
  info["cuda_architectures"] = words(FASTGEN_CUDA_ARCHITECTURES);
  info["cuda_version"] = FASTGEN_CUDA_VERSION;
  info["torch_version"] = FASTGEN_TORCH_VERSION;
  info["compiler"] = __VERSION__;
  return info;
}

py::dict latent_plan(int64_t rows, int64_t cols, int element_size, int multiprocessors) {
  const auto plan = fastgen::latent::make_plan(rows, cols, element_size, multiprocessors);
  py::dict result;
  result["threads_per_row"] = plan.threads_per_row;
  result["rows_per_block"] = plan.rows_per_block;
  result["row_blocks"] = plan.row_blocks;
  result["splits"] = plan.splits;
  return result;
}

std::vector<std::pair<int, int>> attention_tiles(bool second_order) {
  std::vector<std::pair<int, int>> tiles;
  const auto add = [&](const auto& table) {
    for (const auto& dims : table) tiles.emplace_back(dims.key, dims.value);
  };
  second_order ? add(fastgen::attention::kSecondOrderHeadDims) : add(fastgen::attention::kHeadDims);
  return tiles;
}

// owns_queries: blocks own BLOCK_M queries and iterate over BLOCK_N keys, otherwise the other way round.
py::dict describe(const fastgen::attention::Plan& plan, bool owns_queries = true) {
  py::dict result;
  result["tile"] = py::make_tuple(plan.dims.key, plan.dims.value);
  result["warps"] = plan.warps;
  result["block_m"] = owns_queries ? plan.owned : plan.iterated;
  result["block_n"] = owns_queries ? plan.iterated : plan.owned;
  result["tiles_per_block"] = plan.tiles_per_block;
  result["blocks"] = plan.blocks;
  result["slices"] = plan.slices;
  result["shared_bytes"] = plan.shared_bytes;
  return result;
}

py::dict attention_plan(int64_t batch, int64_t heads, int64_t key_heads, int64_t queries, int64_t keys, int key_dim,
                        int value_dim, int element_size, int multiprocessors, bool plain,
                        const std::optional<std::array<int, 4>>& mask) {
  namespace attention = fastgen::attention;
  const attention::Dims dims = {key_dim, value_dim};
  if (attention::find_head_dims(attention::kHeadDims, dims) < 0) {
    throw py::value_error("key_dim, value_dim: larger than every compiled tile");
  }
  const attention::Sizes sizes = {batch, heads, key_heads, queries, keys, key_dim, value_dim, element_size, plain};
  py::dict result;
  result["forward"] = describe(attention::forward_plan(sizes, multiprocessors));
  result["query"] = describe(attention::backward_query_plan(sizes));
  result["key_value"] = describe(attention::backward_key_value_plan(sizes), false);
  const bool second_order = attention::find_head_dims(attention::kSecondOrderHeadDims, dims) >= 0;
  if (second_order) {
    result["tangent"] = describe(attention::tangent_plan(sizes));
    result["second order query"] = describe(attention::second_order_query_plan(sizes));
    result["second order key_value"] = describe(attention::second_order_key_value_plan(sizes), false);
  }
  if (mask.has_value()) {
    const int sizes_of_mask[4] = {(*mask)[0], (*mask)[1], (*mask)[2], (*mask)[3]};
    result["mask"] = describe(attention::mask_plan(sizes, sizes_of_mask, multiprocessors, false));
    if (second_order) {
      result["second order mask"] = describe(attention::mask_plan(sizes, sizes_of_mask, multiprocessors, true));
    }
  }
  return result;
}

py::dict projection_plan(int batch, int tokens, int inputs, int outputs, int widest, int element_size,
                         int multiprocessors) {
  namespace projection = fastgen::projection;
  const projection::Tokens shape = {batch, tokens, tokens};
  const auto describe_tile = [](const projection::Plan& plan) {
    const projection::TileShape& tile = projection::kTileShapes[plan.tile];
    py::dict result;
    result["tile"] = py::make_tuple(tile.block_m, tile.block_n);
    result["warps"] = tile.threads() / 32;
    result["blocks"] = plan.row_tiles * plan.column_tiles * plan.splits;
    result["splits"] = plan.splits;
    return result;
  };
  py::dict result;
  result["forward"] = describe_tile(projection::project_plan(shape, outputs, widest, multiprocessors));
  result["input gradient"] = describe_tile(projection::project_plan(shape, inputs, 1, multiprocessors));
  result["weight gradient"] =
      describe_tile(projection::gradient_plan(shape, outputs, inputs, element_size, multiprocessors));
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and launch plans.";
  m.def("build_info", &build_info, "CUDA architectures, and versions of CUDA, torch and the compiler.");
  m.def("latent_plan", &latent_plan, py::arg("rows"), py::arg("cols"), py::arg("element_size"),
        py::arg("multiprocessors"), "Launch plan of the latent kernels for a (rows, cols) latent.");
  m.def(
      "attention_tiles", &attention_tiles, py::arg("second_order") = false,
      "Head dims (key, value) that attention kernels are compiled for; ``second_order``: those of tangents and second "
      "derivatives.");
  m.def("attention_plan", &attention_plan, py::arg("batch"), py::arg("heads"), py::arg("key_heads"), py::arg("queries"),
        py::arg("keys"), py::arg("key_dim"), py::arg("value_dim"), py::arg("element_size"), py::arg("multiprocessors"),
        py::arg("plain") = true, py::arg("mask") = py::none(),
        "Launch plan of each attention kernel. ``plain``: no mask and no dropout; ``mask``: sizes of a mask that "
        "requires a "
        "gradient.");
  m.def("projection_plan", &projection_plan, py::arg("batch"), py::arg("tokens"), py::arg("inputs"), py::arg("outputs"),
        py::arg("widest"), py::arg("element_size"), py::arg("multiprocessors"),
        "Launch plan of each projection kernel. ``batch``: 1 if tokens are numbered across the batch; ``widest``: "
        "largest "
        "head dim that must be in one tile.");
}
