// What stands for CUDA's runtime, and for torch's CUDA library, where the library of the CUDA kernels is
// linked for a CPU: kernels that nvcc compiled to PTX run on the machine. The code of the host is the one of
// a GPU: registration, launches, attributes and streams.
#include <dlfcn.h>

#include <map>
#include <utility>

#include "machine.h"

using namespace ptx;

namespace {

// PTX and the name of a kernel to the handle of a library (dlopen), 0 where it cannot be compiled.
using Compile = void* (*)(const char* ptx, size_t length, const char* name);
Compile compiler = nullptr;
thread_local std::string error;

struct Kernel {
  std::string name;
  const char* ptx = nullptr;
  size_t length = 0, allowed = 48 * 1024;
  Code code;
};

std::map<const void*, Kernel>& registered() {
  static std::map<const void*, Kernel> all;
  return all;
}

}  // namespace

EXPORTED void ptx_set_compiler(Compile given) {
  compiler = given;
}

// Kernels are asked for anew when they are launched next.
EXPORTED void ptx_forget() {
  for (auto& [function, kernel] : registered()) kernel.code = Code();
}

// A kernel that was compiled elsewhere (Triton's); 0, or what went wrong.
EXPORTED const char* ptx_launch(void* library, const char* name, const unsigned* grid, unsigned threads,
                                size_t shared, void** arguments) {
  struct Start {  // Triton's swizzles count on a multiple of 1024, and a GPU's shared memory starts at one
    const u32 before = std::exchange(Machine::here().shared_start, 1024);
    ~Start() { Machine::here().shared_start = before; }
  } start;
  try {
    ptx::launch(loaded(library, name), {grid[0], grid[1], grid[2]}, {threads, 1, 1}, shared, arguments);
    return nullptr;
  } catch (const std::exception& failure) {
    error = failure.what();
    return error.c_str();
  }
}

// CUDA's runtime, as far as the library uses it.

extern "C" {

struct Dim3 {
  unsigned x, y, z;
};

// The code of a module: a wrapper around a list of entries (fatbinary_section.h of the toolkit has the
// wrapper), of which those of kind 1 hold PTX.
struct Wrapper {
  int magic, version;
  const unsigned char* data;
};

struct Module {
  const char* ptx;
  size_t length;
};

void** __cudaRegisterFatBinary(void* given) {
  const auto* wrapper = static_cast<const Wrapper*>(given);
  const unsigned char* data = wrapper->data;
  const auto number = [](const unsigned char* at, int bytes) {
    u64 result = 0;
    memcpy(&result, at, static_cast<size_t>(bytes));
    return result;
  };
  if (wrapper->magic != 0x466243b1 || number(data, 4) != 0xba55ed50u) std::abort();
  const unsigned char* entry = data + number(data + 6, 2);
  const unsigned char* end = entry + number(data + 8, 8);
  while (entry < end) {
    const u64 kind = number(entry, 2), head = number(entry + 4, 4), length = number(entry + 8, 8);
    if (kind == 1)
      return reinterpret_cast<void**>(new Module{reinterpret_cast<const char*>(entry + head), length});
    entry += head + length;
  }
  std::abort();
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void** module) {
  delete reinterpret_cast<Module*>(module);
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
  const auto* module = reinterpret_cast<const Module*>(handle);
  Kernel& kernel = registered()[host];
  kernel.name = name;
  kernel.ptx = module->ptx;
  kernel.length = module->length;
}

// Of the <<<...>>> syntax, which is not used.
int __cudaGetKernel(void**, const void*) {
  std::abort();
}
int __cudaLaunchKernel(void*, Dim3, Dim3, void**, size_t, void*) {
  std::abort();
}
unsigned __cudaPopCallConfiguration(Dim3*, Dim3*, size_t*, void*) {
  std::abort();
}

int cudaLaunchKernel(const void* function, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  try {
    const auto found = registered().find(function);
    if (found == registered().end()) throw std::runtime_error("a kernel that was not registered");
    Kernel& kernel = found->second;
    if (shared > kernel.allowed) throw std::runtime_error("more shared memory than was allowed");
    if (kernel.code.run == nullptr) {
      void* library =
          compiler == nullptr ? nullptr : compiler(kernel.ptx, kernel.length, kernel.name.c_str());
      if (library == nullptr) throw std::runtime_error("the PTX of " + kernel.name + " is not translated");
      kernel.code = loaded(library, kernel.name);
    }
    ptx::launch(kernel.code, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, arguments);
    return 0;
  } catch (const std::exception& failure) {
    error = failure.what();
    return 719;  // cudaErrorLaunchFailure
  }
}
int cudaMemsetAsync(void* memory, int value, size_t bytes, void*) {
  memset(memory, value, bytes);
  return 0;
}
int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
const char* cudaGetErrorString(int) {
  return error.c_str();
}
int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  constexpr int kDynamicShared = 8;
  const size_t most = Machine::here().gpu.most_shared;
  if (attribute != kDynamicShared || static_cast<size_t>(value) > most) {
    error = "more shared memory than the GPU has for a block";
    return 1;
  }
  registered().at(function).allowed = static_cast<size_t>(value);
  return 0;
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  const emulate::Gpu& gpu = Machine::here().gpu;
  switch (attribute) {
    case 97:
      *value = static_cast<int>(gpu.most_shared);
      return 0;  // of a block that asks for it
    case 16:
      *value = gpu.processors;
      return 0;
    case 75:
      *value = gpu.warpgroups ? 9 : 8;
      return 0;  // compute capability
    case 76:
      *value = 0;
      return 0;
  }
  error = "an attribute that the emulator does not know";
  return 1;
}

// torch's CUDA library: tensors of the CPU are those of the GPU here, and the kernels are theirs.

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
int32_t aoti_torch_delete_device_guard(void*) {
  return 0;
}
int32_t aoti_torch_device_type_cuda();
int32_t aoti_torch_get_device_type(void*, int32_t* type) {
  *type = aoti_torch_device_type_cuda();
  return 0;
}
int32_t aoti_torch_get_device_index(void*, int32_t* index) {
  *index = 0;
  return 0;
}
int32_t aoti_torch_library_init_impl(const char* space, const char*, const char* file, uint32_t line,
                                     void** library) {
  using Init = int32_t (*)(const char*, const char*, const char*, uint32_t, void**);
  const auto init = reinterpret_cast<Init>(dlsym(RTLD_DEFAULT, "aoti_torch_library_init_impl"));
  return init(space, "CPU", file, line, library);
}

}  // extern "C"

// The switches of the emulator, as csrc/cuda/tensors.cu has them.
EXPORTED void rlsedit_emulate_descending(int yes) {
  Machine::here().descending = yes != 0;
}
EXPORTED void rlsedit_emulate_beside(int blocks) {
  Machine::here().beside = static_cast<unsigned>(blocks);
}
EXPORTED void rlsedit_emulate_gpu(int shared, int processors, int warpgroups) {
  Machine::here().gpu = {static_cast<size_t>(shared), processors, warpgroups != 0};
}
EXPORTED int rlsedit_emulate_launches() {
  return Machine::here().launches;
}
