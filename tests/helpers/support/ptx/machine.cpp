// What stands for CUDA's runtime, and for torch's CUDA library, where the library of the CUDA kernels is
// linked for a CPU: kernels that nvcc compiled to PTX run on the emulator of csrc/cuda/host. The code of the
// host is the one of a GPU: registration, launches, attributes and streams.
//
// Also what threads do together (instructions.h): barriers, shuffles, products, copies, order between blocks.
#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#define RLSEDIT_EMULATE
#include "host/emulate.h"

#include "instructions.h"

namespace emulate = rlsedit::emulate;
using emulate::Machine;

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

unsigned char* in_shared(u64 address, u64 bytes, const char* what) {
  Machine& machine = Machine::here();
  const u32 start = machine.shared_start;
  if (address < start || address + bytes > start + machine.shared_bytes()) machine.fail(what);
  return machine.shared() + (address - start);
}

unsigned* counter(u64 place) {
  if (place % 4 != 0 || place < 4096) Machine::here().fail("a misaligned atomic access");
  return reinterpret_cast<unsigned*>(place);
}

// What a thread saw at its last acquire: the same number once more means that it waits.
struct Seen {
  u64 place = 0;
  u32 value = 0;
  unsigned x = 0, y = 0, z = 0;
};
thread_local std::map<const emulate::Fiber*, Seen> seen;

u32 acquired(unsigned* from, u32 value) {
  Machine& machine = Machine::here();
  Seen& last = seen[&machine.current()];
  const Seen now{reinterpret_cast<u64>(from), value, machine.block.x, machine.block.y, machine.block.z};
  const bool again =
      last.place == now.place && last.value == value && last.x == now.x && last.y == now.y && last.z == now.z;
  last = now;
  if (!again) {
    machine.moved();
    return value;
  }
  machine.pause();
  const u32 later = __atomic_load_n(from, __ATOMIC_ACQUIRE);
  if (later != value) machine.moved();
  seen[&machine.current()].value = later;
  return later;
}

}  // namespace

EXPORTED void ptx_fail(const char* what) {
  Machine::here().fail(what);
  std::abort();  // a thread that failed is never gone on with
}

EXPORTED void ptx_barrier(u32 number, u32 threads) {
  Machine& machine = Machine::here();
  if (threads == 0 || threads == machine.threads())
    machine.wait_for_block(__FILE__, __LINE__);
  else if (threads == 128 && number > 0)
    machine.wait_for_group(static_cast<int>(number) - 1);
  else
    machine.fail("a barrier that the emulator does not know");
}

EXPORTED void ptx_warp_sync(u32 lanes) {
  if (lanes != 0xffffffffu) Machine::here().fail("a barrier of a part of a warp");
  Machine::here().wait_for_warp(__FILE__, __LINE__);
}

// PTX ISA, shfl.sync; `segment`: the last lane in bits 0-4, the mask of the lanes of a segment in bits 8-12.
EXPORTED u32 ptx_shuffle(int mode, u32 value, u32 b, u32 c, u32 lanes, bool* in_range) {
  if (lanes != 0xffffffffu) Machine::here().fail("a shuffle of a part of a warp");
  auto words = Machine::here().show(&value, sizeof value);
  const int lane = Machine::here().thread() & 31;
  const int last = static_cast<int>(c & 31), mask = static_cast<int>(c >> 8 & 31),
            by = static_cast<int>(b & 31);
  const int most = (lane & mask) | (last & ~mask & 31), least = lane & mask;
  int from = 0;
  bool inside = true;
  if (mode == 0) {
    from = least | (by & ~mask & 31);
    inside = from <= most;
  } else if (mode == 1) {
    from = lane ^ by;
    inside = from <= most;
  } else if (mode == 2) {
    from = lane - by;
    inside = from >= most;
  } else {
    from = lane + by;
    inside = from <= most;
  }
  *in_range = inside;
  u32 result;
  memcpy(&result, words[inside ? from : lane], sizeof result);
  return result;
}

// PTX ISA, ldmatrix and stmatrix, .m8n8 .b16: matrix i lies in rows of 16 bytes, at the addresses of lanes 8
// i to 8 i + 7; lane l has 4 bytes of each, of row l / 4 those from 4 (l % 4) on.
EXPORTED void ptx_load_matrices(u32* d, int count, u64 row) {
  auto words = Machine::here().show(&row, sizeof row);
  const int lane = Machine::here().thread() & 31;
  for (int i = 0; i < count; ++i) {
    const u64 from = words[8 * i + lane / 4][0];
    if (from % 16 != 0) Machine::here().fail("ldmatrix: a misaligned row");
    memcpy(&d[i], in_shared(from, 16, "ldmatrix outside of shared memory") + 4 * (lane % 4), 4);
  }
}
EXPORTED void ptx_store_matrices(const u32* values, int count, u64 row) {
  auto words = Machine::here().show(&row, sizeof row);
  const int lane = Machine::here().thread() & 31;
  for (int i = 0; i < count; ++i) {
    const u64 to = words[8 * i + lane / 4][0];
    if (to % 16 != 0) Machine::here().fail("stmatrix: a misaligned row");
    memcpy(in_shared(to, 16, "stmatrix outside of shared memory") + 4 * (lane % 4), &values[i], 4);
  }
}

EXPORTED void ptx_mma_tf32(f32* d, const u32* a, const u32* b) {
  emulate::mma_tf32(*reinterpret_cast<float (*)[4]>(d), *reinterpret_cast<const u32(*)[4]>(a),
                    *reinterpret_cast<const u32(*)[2]>(b));
}
EXPORTED void ptx_mma_f64(f64* d, const f64* a, const f64* b) {
  emulate::mma_f64(d[0], d[1], a[0], b[0]);
}

EXPORTED void ptx_copy(u64 to, u64 from, int bytes, u32 valid) {
  if (to % bytes != 0 || from % bytes != 0) Machine::here().fail("cp.async: a misaligned address");
  if (static_cast<int>(valid) > bytes) Machine::here().fail("cp.async: more bytes than it copies");
  unsigned char* place = in_shared(to, static_cast<u64>(bytes), "cp.async outside of shared memory");
  emulate::copy_async(place, reinterpret_cast<const void*>(from), bytes, static_cast<int>(valid));
}
EXPORTED void ptx_copy_commit() {
  emulate::copy_commit();
}
EXPORTED void ptx_copy_wait(int left) {
  emulate::copy_wait(static_cast<size_t>(left));
}
EXPORTED void ptx_prefetch(u64 place) {
  if (place < 4096) Machine::here().fail("a prefetch of address 0");
}

EXPORTED u32 ptx_acquire(u64 place) {
  unsigned* from = counter(place);
  return acquired(from, __atomic_load_n(from, __ATOMIC_ACQUIRE));
}
EXPORTED void ptx_release(u64 place, u32 value) {
  __atomic_store_n(counter(place), value, __ATOMIC_RELEASE);
  Machine::here().moved();
}
EXPORTED u32 ptx_add(u64 place, u32 more) {
  unsigned* at = counter(place);
  if (more == 0) return acquired(at, __atomic_load_n(at, __ATOMIC_ACQUIRE));  // a look at it
  const unsigned before = __atomic_fetch_add(at, more, __ATOMIC_ACQ_REL);
  Machine::here().moved();
  Machine::here().pause();
  return before;
}
EXPORTED u32 ptx_exchange(u64 place, u32 value) {
  Machine::here().moved();
  return __atomic_exchange_n(counter(place), value, __ATOMIC_ACQ_REL);
}

// Hopper's.

namespace {
uint64_t* barrier_at(u64 place) {
  if (place % 8 != 0) Machine::here().fail("a misaligned barrier");
  return reinterpret_cast<uint64_t*>(in_shared(place, 8, "a barrier outside of shared memory"));
}
}  // namespace

EXPORTED void ptx_barrier_init(u64 place, u32 arrivals) {
  emulate::barrier_start(barrier_at(place), static_cast<int>(arrivals));
}
EXPORTED void ptx_barrier_arrive(u64 place, u32 bytes) {
  emulate::barrier_arrive(barrier_at(place), static_cast<int>(bytes));
}
EXPORTED bool ptx_barrier_wait(u64 place, u32 parity) {
  emulate::barrier_wait(barrier_at(place), static_cast<int>(parity));
  return true;
}
EXPORTED void ptx_copy_bulk(u64 to, u64 from, u32 bytes, u64 barrier) {
  if (to % 16 != 0) Machine::here().fail("a misaligned bulk copy");
  emulate::copy_bulk(in_shared(to, bytes, "a bulk copy outside of shared memory"),
                     reinterpret_cast<const void*>(from), static_cast<int>(bytes), barrier_at(barrier));
}
EXPORTED void ptx_fence_async() {
  emulate::fence_async();
}
EXPORTED void ptx_wgmma_fence() {
  emulate::wgmma_fence();
}
EXPORTED void ptx_wgmma_commit() {
  emulate::wgmma_commit();
}
EXPORTED void ptx_wgmma_wait() {
  emulate::wgmma_wait(0);
}
EXPORTED void ptx_wgmma(f32* sums, int columns, const u32* a, u64 right, bool adds) {
  emulate::wgmma_tf32(sums, columns, *reinterpret_cast<const u32(*)[4]>(a), right, adds);
}

// A profile. The n-th time that the lanes of a warp are at a place of the code is one access of the warp.

namespace {

struct Note {
  u32 site;
  char space;
  u64 address;
  u32 bytes;
};

struct Site {
  u64 accesses = 0, lanes = 0, cost = 0, least = 0;
};

// Lanes of a warp that have ended.
struct Ended {
  size_t count = 0;
  std::vector<std::vector<Note>> lanes{32};
};

struct Profile {
  u64 counts[k_kinds] = {}, launches = 0, blocks = 0, threads = 0;
  const char* const* places = nullptr;
  std::map<std::pair<u32, char>, Site> sites;
  std::map<std::pair<u64, u32>, Ended> warps;  // of a block
};

thread_local bool profiling = false;
// By name and code: Triton compiles a function several times.
thread_local std::map<std::pair<std::string, const void*>, Profile> profiles;
thread_local Profile nothing;
thread_local Profile* profile = &nothing;  // of the kernel that runs
thread_local std::map<const emulate::Fiber*, std::vector<Note>> notes;

// Rounds of the 32 banks of shared memory that lanes' words take. Lanes are served together whose accesses
// have 128 bytes.
u64 rounds(const std::vector<Note>& lanes, u64& least) {
  const size_t together = 128 / std::max(4u, lanes[0].bytes);
  u64 cost = 0;
  for (size_t first = 0; first < lanes.size(); first += together) {
    std::map<u64, std::set<u64>> banks;
    std::set<u64> words;
    for (size_t i = first; i < std::min(first + together, lanes.size()); ++i)
      for (u64 word = lanes[i].address / 4; word * 4 < lanes[i].address + lanes[i].bytes; ++word) {
        banks[word % 32].insert(word);
        words.insert(word);
      }
    u64 most = 0;
    for (const auto& [bank, used] : banks) most = std::max<u64>(most, used.size());
    cost += most;
    least += (words.size() + 31) / 32;
  }
  return cost;
}

// Sectors of 32 bytes of global memory.
u64 sectors(const std::vector<Note>& lanes, u64& least) {
  std::set<u64> touched, words;
  for (const Note& note : lanes)
    for (u64 word = note.address / 4; word * 4 < note.address + note.bytes; ++word) {
      words.insert(word);
      touched.insert(word / 8);
    }
  least += (words.size() + 7) / 8;
  return touched.size();
}

void warp_ended(const std::vector<std::vector<Note>>& lanes) {
  std::map<std::pair<u32, char>, std::vector<std::vector<Note>>> accesses;
  for (const auto& lane : lanes) {
    std::map<std::pair<u32, char>, size_t> turns;
    for (const Note& note : lane) {
      auto& all = accesses[{note.site, note.space}];
      const size_t turn = turns[{note.site, note.space}]++;
      if (turn == all.size()) all.emplace_back();
      all[turn].push_back(note);
    }
  }
  for (const auto& [key, all] : accesses) {
    Site& site = profile->sites[key];
    for (const auto& together : all) {
      ++site.accesses;
      site.lanes += together.size();
      site.cost += key.second == 's' ? rounds(together, site.least) : sectors(together, site.least);
    }
  }
}

void thread_ended(const Thread& thread) {
  ++profile->threads;
  const u64 block =
      (u64(thread.ctaid.z) * thread.nctaid.y + thread.ctaid.y) * thread.nctaid.x + thread.ctaid.x;
  const auto key = std::make_pair(block, thread.tid.x / 32);
  Ended& warp = profile->warps[key];
  std::swap(warp.lanes[thread.tid.x % 32], notes[&Machine::here().current()]);
  if (++warp.count < 32) return;
  warp_ended(warp.lanes);
  profile->warps.erase(key);
}

}  // namespace

EXPORTED void ptx_note(u32 site, char space, u64 address, u32 bytes) {
  notes[&Machine::here().current()].push_back({site, space, address, bytes});
}

// From now on or no longer; either way nothing has been counted.
EXPORTED void ptx_profile(int on) {
  profiles.clear();
  profile = &nothing;
  profiling = on != 0;
}

// Lines of what was counted, by tabs: kernel, launches, blocks, threads, instructions by kind; and behind it
// its places, which begin with an empty field: instruction and line, space, accesses of warps, lanes in them,
// rounds or sectors, and the least that would do.
EXPORTED const char* ptx_profile_report() {
  static thread_local std::string text;
  std::ostringstream out;
  for (const auto& [key, one] : profiles) {
    out << key.first << '\t' << one.launches << '\t' << one.blocks << '\t' << one.threads;
    for (const u64 count : one.counts) out << '\t' << count;
    out << '\n';
    for (const auto& [place, site] : one.sites)
      out << '\t' << one.places[place.first] << '\t' << place.second << '\t' << site.accesses << '\t'
          << site.lanes << '\t' << site.cost << '\t' << site.least << '\n';
  }
  text = out.str();
  return text.c_str();
}

// A launch.

namespace {

using Compiled = void (*)(const Thread&, void* const*);

struct Code {
  std::string name;
  Compiled run = nullptr;
  const char* const* places = nullptr;
  unsigned bytes = 0, most_threads = 0;  // of shared memory beside the dynamic one
};

void launch_compiled(const Code& code, emulate::Index grid, emulate::Index block, size_t shared,
                     void** arguments) {
  Machine& machine = Machine::here();
  if (block.y != 1 || block.z != 1) throw std::runtime_error("blocks of more than one dimension");
  if (block.x > code.most_threads) throw std::runtime_error("more threads than the kernel was compiled for");
  const size_t bytes = shared + code.bytes;
  seen.clear();
  if (profiling) {
    profile = &profiles[{code.name, code.places}];
    profile->places = code.places;
    ++profile->launches;
    profile->blocks += u64(grid.x) * grid.y * grid.z;
  }
  machine.run(grid, static_cast<int>(block.x), bytes, [&] {
    const auto place = machine.block;
    const Thread thread{{static_cast<u32>(machine.thread()), 0, 0},
                        {block.x, 1, 1},
                        {place.x, place.y, place.z},
                        {grid.x, grid.y, grid.z},
                        machine.shared(),
                        machine.shared_start,
                        static_cast<u32>(bytes),
                        profile->counts};
    code.run(thread, arguments);
    if (profiling) thread_ended(thread);
  });
}

Code loaded(void* library, const std::string& name) {
  Code code;
  code.name = name;
  code.run = reinterpret_cast<Compiled>(dlsym(library, "ptx_kernel"));
  if (code.run == nullptr) throw std::runtime_error("no kernel in the library of a kernel");
  code.places = static_cast<const char* const*>(dlsym(library, "ptx_sites"));
  if (profiling && code.places == nullptr)
    throw std::runtime_error("a kernel that was not compiled for a profile");
  code.bytes = *static_cast<const unsigned*>(dlsym(library, "ptx_static"));
  code.most_threads = *static_cast<const unsigned*>(dlsym(library, "ptx_most_threads"));
  return code;
}

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
    launch_compiled(loaded(library, name), {grid[0], grid[1], grid[2]}, {threads, 1, 1}, shared, arguments);
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
    launch_compiled(kernel.code, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, arguments);
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
