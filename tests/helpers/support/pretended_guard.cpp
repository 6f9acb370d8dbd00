// What "cuda" without an index is, for torch's CPU build: device 0, of which nothing is known.
#undef TORCH_TARGET_VERSION
#include <c10/core/impl/DeviceGuardImplInterface.h>

C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
