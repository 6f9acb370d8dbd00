// What the parts of the machine share: a kernel that was translated, its launch, and the profile that may
// watch it.
#pragma once

#include <string>

#define RLSEDIT_EMULATE
#include "host/emulate.h"

#include "instructions.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace ptx {

namespace emulate = rlsedit::emulate;
using emulate::Machine;

// A kernel in C++.
struct Code {
  std::string name;
  void (*run)(const Thread&, void* const*) = nullptr;
  const char* const* places = nullptr;   // of accesses, for a profile
  unsigned bytes = 0, most_threads = 0;  // of shared memory beside the dynamic one
};

// From the library that translate.py's source was compiled to.
Code loaded(void* library, const std::string& name);
// Throws std::runtime_error where the kernel does what a GPU does not allow.
void launch(const Code& code, emulate::Index grid, emulate::Index block, size_t shared, void** arguments);

// While there is a profile (profile.cpp).
bool profiling();
u64* launch_begins(const Code& code, u64 blocks);  // where its threads count their instructions
void thread_ends(const Thread& thread);

}  // namespace ptx
