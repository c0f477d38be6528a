// The emulator's controls for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>

#include "core/control.h"
#include "core/report.h"

namespace py = pybind11;

namespace fastgen::kernels {

namespace {

// Of tests that choose none: FASTGEN_EMULATOR_ROUNDING.
std::string default_rounding() {
  const char* given = std::getenv("FASTGEN_EMULATOR_ROUNDING");
  return given == nullptr ? "nearest" : given;
}

}  // namespace

void bind_controls(py::module_& m) {
  py::register_exception<emulator::Finding>(m, "Finding", PyExc_RuntimeError);
  m.def(
      "configure",
      [](uint64_t seed, bool checks, bool count_banks, const std::string& leave_out, size_t shared_limit,
         const std::string& rounding) {
        emulator::configure(
            {seed, checks, count_banks, emulator::matrix_rounding(rounding, seed), leave_out, shared_limit});
      },
      py::arg("seed") = 0, py::arg("checks") = true, py::arg("count_banks") = true, py::arg("leave_out") = "",
      py::arg("shared_limit") = emulator::Options().shared_limit, py::arg("rounding") = default_rounding());
  m.def("sites", emulator::sites);
  m.def("statistics", [] {
    py::dict kernels;
    for (const auto& [name, c] : emulator::statistics()) {
      py::dict row;
      row["launches"] = c.launches;
      row["blocks"] = c.blocks;
      row["block_barriers"] = c.block_barriers;
      row["warp_barriers"] = c.warp_barriers;
      row["shuffles"] = c.shuffles;
      row["matrix_products"] = c.matrix_products;
      row["matrix_loads"] = c.matrix_loads;
      row["async_copies"] = c.async_copies;
      row["atomics"] = c.atomics;
      row["shared_accesses"] = c.shared_accesses;
      row["shared_passes"] = c.shared_passes;
      row["bank_conflicts"] = c.shared_passes - c.shared_passes_least;
      kernels[py::str(name)] = row;
    }
    return kernels;
  });
}

}  // namespace fastgen::kernels
