// Instructions of PTX for kernels that translate.py has made C++ of: what a thread does alone, inline; what
// threads do together, in machine.cpp.
//
// Stricter than x86 where a GPU is: a load or store of n bytes, of a vector as a whole, is at a multiple of
// n, shared memory has an end, and address 0 is nobody's.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

using u8 = uint8_t;
using s8 = int8_t;
using u16 = uint16_t;
using s16 = int16_t;
using u32 = uint32_t;
using s32 = int32_t;
using u64 = uint64_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;
using pred = bool;

struct Index3 {
  u32 x, y, z;
};

struct Thread {
  Index3 tid, ntid, ctaid, nctaid;
  unsigned char* shared;
  u32 start, bytes;  // of shared memory
  u64* counts;       // of a profile
};

// A profile (profile.py): how many instructions of a kind, and which addresses at which place of the code.
enum Kind {
  k_mma,
  k_shared,
  k_global,
  k_copy,
  k_shuffle,
  k_barrier,
  k_special,
  k_parameter,
  k_float,
  k_jump,
  k_integer,
  k_kinds
};
#ifdef PTX_PROFILE
#define PTX_COUNT(kind) ++thread.counts[kind]
#define PTX_NOTE(site, space, address, bytes) ptx_note(site, space, address, bytes)
#else
#define PTX_COUNT(kind) (void)0
#define PTX_NOTE(site, space, address, bytes) (void)0
#endif

extern "C" {
[[noreturn]] void ptx_fail(const char* what);
void ptx_barrier(u32 number, u32 threads);
void ptx_warp_sync(u32 lanes);
u32 ptx_shuffle(int mode, u32 value, u32 lane, u32 segment, u32 lanes, bool* in_range);
void ptx_load_matrices(u32* d, int count, u64 row);
void ptx_store_matrices(const u32* values, int count, u64 row);
void ptx_mma_tf32(f32* d, const u32* a, const u32* b);
void ptx_mma_f64(f64* d, const f64* a, const f64* b, int halves, int parts);
void ptx_copy(u64 to, u64 from, int bytes, u32 valid);
void ptx_copy_commit();
void ptx_copy_wait(int left);
void ptx_prefetch(u64 place);
void ptx_note(u32 site, char space, u64 address, u32 bytes);
u32 ptx_acquire(u64 place);
void ptx_release(u64 place, u32 value);
u32 ptx_add(u64 place, u32 more);
u32 ptx_exchange(u64 place, u32 value);
void ptx_barrier_init(u64 place, u32 arrivals);
void ptx_barrier_arrive(u64 place, u32 bytes);
bool ptx_barrier_wait(u64 place, u32 parity);
void ptx_copy_bulk(u64 to, u64 from, u32 bytes, u64 barrier);
void ptx_fence_async();
void ptx_wgmma_fence();
void ptx_wgmma_commit();
void ptx_wgmma_wait();
void ptx_wgmma(f32* sums, int columns, const u32* a, u64 right, bool adds);
}

// Registers: bits, read as what the instruction says.

template <class T>
struct Signed {
  static constexpr bool value = T(-1) < T(0);
};

template <class To, class From>
inline To as(From x) {
  return __builtin_bit_cast(To, x);
}
inline f32 float_of(u32 bits) {
  return as<f32>(bits);
}
inline f64 double_of(u64 bits) {
  return as<f64>(bits);
}
inline f32 not_a_number() {
  return float_of(0x7fffffffu);
}
// Memory.

template <class T>
inline T at(const T* from, int i) {
  T result;
  memcpy(&result, from + i, sizeof result);
  return result;
}
template <class T>
inline void put(T* to, int i, T value) {
  memcpy(to + i, &value, sizeof value);
}

template <class T, int COUNT>
inline T* global(const Thread&, u64 address) {
  if (address % (sizeof(T) * COUNT) != 0) ptx_fail("a misaligned access to global memory");
  if (address < 4096) ptx_fail("an access to address 0");
  return reinterpret_cast<T*>(address);
}
template <class T, int COUNT>
inline T* shared(const Thread& thread, u64 address) {
  if (address % (sizeof(T) * COUNT) != 0) ptx_fail("a misaligned access to shared memory");
  if (address < thread.start || address + sizeof(T) * COUNT > thread.start + thread.bytes)
    ptx_fail("an access outside of shared memory");
  return reinterpret_cast<T*>(thread.shared + (address - thread.start));
}
template <class T>
inline T parameter(const void* place, int offset) {
  return at(reinterpret_cast<const T*>(static_cast<const char*>(place) + offset), 0);
}

// Arithmetic. Integers wrap.

#define PTX_INTEGER(name, expression)                             \
  template <class T>                                              \
  inline T name##_(T x, T y) {                                    \
    if constexpr (sizeof(T) == 8) {                               \
      const u64 a = static_cast<u64>(x), b = static_cast<u64>(y); \
      return static_cast<T>(expression);                          \
    } else {                                                      \
      const u32 a = static_cast<u32>(x), b = static_cast<u32>(y); \
      return static_cast<T>(expression);                          \
    }                                                             \
  }
PTX_INTEGER(mul_lo, a* b)
PTX_INTEGER(and, a& b)
PTX_INTEGER(or, a | b)
PTX_INTEGER(xor, a ^ b)
PTX_INTEGER(add_integers, a + b)
PTX_INTEGER(sub_integers, a - b)
#undef PTX_INTEGER

template <class T>
struct IsFloat {
  static constexpr bool value = false;
};
template <>
struct IsFloat<f32> {
  static constexpr bool value = true;
};
template <>
struct IsFloat<f64> {
  static constexpr bool value = true;
};

template <class T>
inline T add_(T x, T y) {
  if constexpr (IsFloat<T>::value)
    return x + y;
  else
    return add_integers_<T>(x, y);
}
template <class T>
inline T sub_(T x, T y) {
  if constexpr (IsFloat<T>::value)
    return x - y;
  else
    return sub_integers_<T>(x, y);
}
template <class T>
inline T mul_(T x, T y) {
  static_assert(IsFloat<T>::value, "integers: lo, hi or wide");
  return x * y;
}
template <class T>
inline T fma_(T x, T y, T z) {
  return sizeof(T) == 4 ? T(fmaf(x, y, z)) : T(fma(x, y, z));
}
template <class T>
inline T mad_lo_(T x, T y, T z) {
  return add_<T>(mul_lo_<T>(x, y), z);
}
template <class T>
struct Wide;
template <>
struct Wide<u16> {
  using type = u32;
};
template <>
struct Wide<s16> {
  using type = s32;
};
template <>
struct Wide<u32> {
  using type = u64;
};
template <>
struct Wide<s32> {
  using type = s64;
};
template <class T>
inline typename Wide<T>::type mul_wide_(T x, T y) {
  using W = typename Wide<T>::type;
  return W(x) * W(y);
}
template <class T>
inline typename Wide<T>::type mad_wide_(T x, T y, typename Wide<T>::type z) {
  return add_(mul_wide_<T>(x, y), z);
}
template <class T>
inline T mul_hi_(T x, T y) {
  if constexpr (sizeof(T) == 8) {
    using W = __int128;
    static_assert(Signed<T>::value, "mul.hi.u64");
    return T((W(x) * W(y)) >> 64);
  } else {
    return T(mul_wide_<T>(x, y) >> 32);
  }
}
template <class T>
inline T div_(T x, T y) {
  if constexpr (!IsFloat<T>::value)
    if (y == 0) ptx_fail("a division by zero");
  return x / y;
}
template <class T>
inline T rem_(T x, T y) {
  if (y == 0) ptx_fail("a division by zero");
  return x % y;
}
template <class T>
inline T min_(T x, T y) {
  if constexpr (IsFloat<T>::value) return sizeof(T) == 4 ? T(fminf(x, y)) : T(fmin(x, y));
  return x < y ? x : y;
}
template <class T>
inline T max_(T x, T y) {
  if constexpr (IsFloat<T>::value) return sizeof(T) == 4 ? T(fmaxf(x, y)) : T(fmax(x, y));
  return x < y ? y : x;
}
// A shift by more than the width leaves nothing, or the sign.
template <class T>
inline T shl_(T x, u32 by) {
  return by >= 8 * sizeof(T) ? T(0) : T(x << by);
}
template <class T>
inline T shr_(T x, u32 by) {
  const u32 most = 8 * sizeof(T) - 1;
  if (by > most) return Signed<T>::value ? T(x >> most) : T(0);
  return T(x >> by);
}
template <class T>
inline T neg_(T x) {
  if constexpr (IsFloat<T>::value)
    return -x;
  else
    return sub_<T>(T(0), x);
}
template <class T>
inline T abs_(T x) {
  if constexpr (IsFloat<T>::value)
    return sizeof(T) == 4 ? T(fabsf(x)) : T(fabs(x));
  else
    return x < 0 ? neg_<T>(x) : x;
}
template <class T>
inline T not_(T x) {
  return T(~x);
}
template <>
inline pred not_<pred>(pred x) {
  return !x;
}
template <>
inline pred and_<pred>(pred x, pred y) {
  return x && y;
}
template <>
inline pred or_<pred>(pred x, pred y) {
  return x || y;
}
template <>
inline pred xor_<pred>(pred x, pred y) {
  return x != y;
}
template <class T>
inline T sqrt_(T x) {
  return sizeof(T) == 4 ? T(sqrtf(x)) : T(sqrt(x));
}
template <class T>
inline T rcp_(T x) {
  return T(1) / x;
}
// Approximate functions may leave the last two bits out, and take what is denormal for zero.
inline f32 rough(f32 exact) {
  return float_of(as<u32>(exact) & 0xfffffffcu);
}
inline f32 flushed(f32 x) {
  return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x;
}
template <class T>
inline T rcp_approx_ftz_(T x) {
  return flushed(rough(1.0f / flushed(x)));
}
template <class T>
inline T rsqrt_approx_ftz_(T x) {
  return flushed(rough(static_cast<f32>(1.0 / sqrt(static_cast<f64>(flushed(x))))));
}
template <class T>
inline T sqrt_approx_ftz_(T x) {
  return flushed(rough(sqrtf(flushed(x))));
}
template <class T>
inline T div_full_(T x, T y) {
  return rough(x / y);
}
template <class T>
inline u32 clz_(T x) {
  if (x == 0) return 8 * sizeof(T);
  return sizeof(T) == 8 ? static_cast<u32>(__builtin_clzll(x)) : static_cast<u32>(__builtin_clz(x));
}
// `length` bits of `bits` put into `into` from bit `start` on.
template <class T>
inline T bfi_(T bits, T into, u32 start, u32 length) {
  const u32 width = 8 * sizeof(T);
  start &= 255;
  length &= 255;
  if (start >= width || length == 0) return into;
  const T ones = length >= width ? T(~T(0)) : T((T(1) << length) - 1), mask = T(ones << start);
  return T((into & ~mask) | ((bits << start) & mask));
}

// `length` bits from bit `start` on; of a signed number with the sign of the last of them.
template <class T>
inline T bfe_(T x, u32 start, u32 length) {
  start &= 255;
  length &= 255;
  u64 bits = static_cast<u64>(static_cast<s64>(x));
  if (sizeof(T) == 4 && !Signed<T>::value) bits &= 0xffffffffu;
  if (length == 0) return 0;
  const u64 shifted = start >= 64        ? (Signed<T>::value && x < 0 ? ~u64(0) : 0)
                      : Signed<T>::value ? static_cast<u64>(static_cast<s64>(bits) >> start)
                                         : bits >> start;
  if (length >= 64) return static_cast<T>(shifted);
  const u64 kept = shifted & ((u64(1) << length) - 1);
  const bool negative = Signed<T>::value && (kept >> (length - 1) & 1);
  return static_cast<T>(negative ? kept | ~((u64(1) << length) - 1) : kept);
}
// Bytes of y x by number, 4 bits for each of the result; the fourth bit: its sign, 8 times.
template <class T>
inline T prmt_(T x, T y, T which) {
  const u64 bytes = u64(y) << 32 | x;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 number = which >> 4 * i & 15;
    u32 byte = bytes >> 8 * (number & 7) & 255;
    if (number & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}

// Conversions. From a floating-point number to an integer: to the range of the integer, NaN to 0.
template <class To, class From>
inline To cvt(From x) {
  return static_cast<To>(x);
}
template <class To, class From>
inline To cvt_rzi(From x) {
  if (x != x) return 0;
  const f64 most = sizeof(To) == 8 ? (Signed<To>::value ? 9223372036854774784.0 : 18446744073709549568.0)
                                   : (Signed<To>::value ? 2147483647.0 : 4294967295.0);
  const f64 least = Signed<To>::value ? (sizeof(To) == 8 ? -9223372036854775808.0 : -2147483648.0) : 0.0;
  const f64 whole = trunc(static_cast<f64>(x));
  return static_cast<To>(whole > most ? most : whole < least ? least : whole);
}
// To nearest with 11 significant bits, ties away from zero.
inline u32 cvt_rna_tf32(f32 x) {
  const u32 bits = as<u32>(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

// Comparisons; those with u are true where a number is NaN.
#define PTX_COMPARE(name, expression)    \
  template <class T>                     \
  inline bool compare_##name(T a, T b) { \
    return expression;                   \
  }
PTX_COMPARE(eq, a == b)
PTX_COMPARE(ne, a == a && b == b && a != b)
PTX_COMPARE(lt, a < b)
PTX_COMPARE(le, a <= b)
PTX_COMPARE(gt, a > b)
PTX_COMPARE(ge, a >= b)
PTX_COMPARE(equ, !(a < b || a > b))
PTX_COMPARE(neu, !(a == b))
PTX_COMPARE(ltu, !(a >= b))
PTX_COMPARE(leu, !(a > b))
PTX_COMPARE(gtu, !(a <= b))
PTX_COMPARE(geu, !(a < b))
PTX_COMPARE(num, a == a && b == b)
PTX_COMPARE(nan, a != a || b != b)
#undef PTX_COMPARE
