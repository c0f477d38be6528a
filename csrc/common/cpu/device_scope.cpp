// CPU implementation of DeviceScope: one device, no streams.
#include "common/torch_api.h"

namespace fastgen {

DeviceScope::Guard::Guard(const Tensor&) {}
DeviceScope::Guard::~Guard() = default;
DeviceScope::DeviceScope(const Tensor& tensor) : guard_(tensor) {}

}  // namespace fastgen
