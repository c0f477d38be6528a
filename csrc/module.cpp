// fastgen._C: what was built, and launch plans. No tensors pass through here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "latent/config.h"

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and launch plans.";
  m.def("build_info", &build_info, "What was built, for which architectures, with which tools.");
  m.def("latent_plan", &latent_plan, py::arg("rows"), py::arg("cols"), py::arg("element_size"),
        py::arg("multiprocessors"), "How a (rows, cols) latent is shared out among CUDA threads.");
}
