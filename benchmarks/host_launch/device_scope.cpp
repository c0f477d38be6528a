// The device scope of the libraries of host_path.py: CPU tensors have no device to select and no stream.
#include "common/torch_api.h"

namespace fastgen {

DeviceScope::Guard::Guard(const Tensor&) {}
DeviceScope::Guard::~Guard() {}
DeviceScope::DeviceScope(const Tensor& tensor) : guard_(tensor) {}

}  // namespace fastgen
