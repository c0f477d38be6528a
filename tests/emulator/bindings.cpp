// The kernels of kernels/ as Python functions over numpy arrays. Compiled for the host and, if nvcc is available, for
// CUDA.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>

#include "device_memory.h"
#include "kernels/registry.h"

namespace py = pybind11;

namespace fastgen::kernels {

void bind_controls(py::module_& m);  // controls.cpp, on the host only

namespace {

using Three = std::array<unsigned, 3>;

dim3 to_dim3(const Three& size) { return dim3(size[0], size[1], size[2]); }

// registry.h
device::TensorMap map_of(const py::array& tensor, const void* data, int box_rows, int columns_left_out = 0) {
  device::TensorLayout layout;
  layout.data = data;
  layout.box[0] = device::kSwizzleBytes / 2, layout.box[1] = static_cast<uint32_t>(box_rows);
  uint64_t stride = 2;
  for (int dim = 0; dim < device::kTensorDims; ++dim) {
    layout.sizes[dim] = dim < tensor.ndim() ? tensor.shape(tensor.ndim() - 1 - dim) : 1;
    stride *= layout.sizes[dim];
    if (dim < device::kTensorDims - 1) layout.strides[dim] = stride;
  }
  layout.sizes[0] -= static_cast<uint64_t>(columns_left_out);
  return device::tensor_map<Half>(layout);
}

// Runs a kernel; the result has the shape and dtype of ``out``, and is initialized with ``initial`` if given.
py::array run(const std::string& name, Kernel kernel, MappedKernel mapped, const Three& grid, const Three& block,
              size_t shared_bytes, const std::vector<py::array>& inputs, const py::array& out, bool initial,
              const std::vector<int>& numbers) {
  MappedArguments arguments;
  if (inputs.size() > std::size(arguments.in) || numbers.size() > std::size(arguments.n)) {
    throw py::value_error("run: at most 3 inputs and 6 numbers");
  }
  std::vector<std::unique_ptr<DeviceMemory>> memory;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const py::array dense = py::array::ensure(inputs[i], py::array::c_style);
    memory.push_back(std::make_unique<DeviceMemory>(dense.data(), dense.nbytes(), true));
    arguments.in[i] = memory.back()->data();
  }
  py::array result(out.dtype(), std::vector<py::ssize_t>(out.shape(), out.shape() + out.ndim()));
  const py::array start = py::array::ensure(out, py::array::c_style);
  DeviceMemory target(initial ? start.data() : nullptr, result.nbytes(), false);
  arguments.out = target.data();
  for (size_t i = 0; i < numbers.size(); ++i) arguments.n[i] = numbers[i];
  const device::Launch config = {to_dim3(grid), to_dim3(block), shared_bytes, nullptr};
  if (mapped == nullptr) {
    device::launch(name.c_str(), kernel, config, static_cast<Arguments>(arguments));
  } else {
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (inputs[i].itemsize() == 2) arguments.maps[i] = map_of(inputs[i], arguments.in[i], arguments.n[1 + i]);
    }
    if (result.itemsize() == 2) arguments.out_map = map_of(result, arguments.out, arguments.n[4], arguments.n[5]);
    device::launch(name.c_str(), mapped, config, arguments);
  }
  target.read(result.mutable_data());
  return result;
}

py::array run_kernel(const std::string& name, const Three& grid, const Three& block, size_t shared_bytes,
                     const std::vector<py::array>& inputs, const py::array& out, bool initial,
                     const std::vector<int>& numbers) {
  const auto found = kernels().find(name);
  const auto mapped = mapped_kernels().find(name);
  if (found == kernels().end() && mapped == mapped_kernels().end()) {
    throw py::key_error("no kernel is called " + name);
  }
  return run(name, found == kernels().end() ? nullptr : found->second,
             mapped == mapped_kernels().end() ? nullptr : mapped->second, grid, block, shared_bytes, inputs, out,
             initial, numbers);
}

py::array run_planted(size_t index, const Three& grid, const Three& block, size_t shared_bytes,
                      const std::vector<py::array>& inputs, const py::array& out, bool initial,
                      const std::vector<int>& numbers) {
  const Planted& one = planted().at(index);
  return run(one.sample + " (" + one.mistake + ")", one.kernel, one.mapped, grid, block, shared_bytes, inputs, out,
             initial, numbers);
}

}  // namespace

// Every module with kernels has this name, so that this file is compiled once for all.
PYBIND11_MODULE(kernels_module, m) {
  m.def("run", run_kernel);
  m.def("run_planted", run_planted);
  m.def("kernels", [] {
    std::vector<std::string> names;
    for (const auto& [name, kernel] : kernels()) names.push_back(name);
    for (const auto& [name, kernel] : mapped_kernels()) names.push_back(name);
    return names;
  });
  m.def("planted", [] {
    std::vector<std::tuple<std::string, std::string, std::string>> rows;
    for (const Planted& one : planted()) rows.emplace_back(one.sample, one.mistake, one.finding);
    return rows;
  });
#if defined(FASTGEN_KERNELS_EMULATED)
  bind_controls(m);
#endif
}

}  // namespace fastgen::kernels
