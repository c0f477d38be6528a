// A guard for CUDA devices that does nothing, for a torch without CUDA: autograd asks for one where a fake tensor on
// such a device requires a gradient.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;

C10_REGISTER_GUARD_IMPL(CUDA, Guard);

}  // namespace
