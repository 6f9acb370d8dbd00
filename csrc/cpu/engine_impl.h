// The kernels of the engine, written once over vectors of VB bytes. Included by one translation unit per
// instruction set, inside an anonymous namespace: code compiled for a newer processor must never be the copy
// that the linker keeps for an older one, so nothing here has external linkage and nothing comes from <std>.
#pragma once

#include "engine.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace rlsedit {
namespace {

// Vectors of `bytes` bytes; a template of the element, for gcc forgets the attribute of a type that depends
// on the size alone.
template <class S, int bytes>
struct Vector {
  typedef S type __attribute__((vector_size(bytes)));
};

template <class T, int VB>
struct Kernels {
  typedef T V __attribute__((vector_size(VB)));
  typedef T U __attribute__((vector_size(VB), aligned(sizeof(T))));  // the same vector at any address
  static constexpr int W = VB / static_cast<int>(sizeof(T));
#if defined(__aarch64__)
  static constexpr int kRegisters = 32;
  // 8 x 2 accumulators, 2 loads and 8 entries of A, for no operand is broadcast from memory: 26. Four pipes
  // of four cycles have 16 sums to work on; with 12 x 2, gcc puts some on the stack.
  static constexpr int MR = 8;
#else
  static constexpr int kRegisters = VB == 64 ? 32 : 16;
  // 6 x 2 accumulators, 2 loads and a broadcast: 15 of 16; 12 x 2 and 2 loads: 26 of AVX-512's 32.
  static constexpr int MR = VB == 64 ? 12 : 6;
#endif
  static constexpr int NR = 2 * W;
  static constexpr int kLine = 64 / static_cast<int>(sizeof(T));
  static constexpr int kRows = 48;  // a multiple of MR and of a cache line
  static constexpr int64_t KC = kBlockBytes / (NR * static_cast<int64_t>(sizeof(T)));

  static V load(const T* p) { return *reinterpret_cast<const U*>(p); }
  static void store(T* p, V v) { *reinterpret_cast<U*>(p) = v; }
  // A store that does not fetch the line first; p is aligned to a vector.
  static void store_past_cache(T* p, V v) {
#if defined(__AVX512F__)
    if constexpr (VB == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#endif
#if defined(__AVX2__)
    if constexpr (VB == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#endif
    store(p, v);
  }
  // What was stored past the cache is seen by other threads no later than what comes next.
  static void order_stores() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
  }
  static V splat(T x) { return V{} + x; }
  static int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

  // ---- products -------------------------------------------------------------------------------------------

  // c (MR x NR, unit column stride) <- beta c + alpha a b'
  static void micro(int64_t k, const T* __restrict a, const T* __restrict b, T alpha, T beta, T* c,
                    int64_t rs) {
    V acc[MR][2] = {};
    // The block of C comes from memory while the products run.
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NR; j += kLine) __builtin_prefetch(c + i * rs + j, 1);
    for (int64_t p = 0; p < k; ++p, a += MR, b += NR) {
      const V b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        acc[i][0] += a[i] * b0;
        acc[i][1] += a[i] * b1;
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i, c += rs) {
      if (beta == T(0)) {
        store(c, alpha * acc[i][0]);
        store(c + W, alpha * acc[i][1]);
      } else {
        store(c, beta * load(c) + alpha * acc[i][0]);
        store(c + W, beta * load(c + W) + alpha * acc[i][1]);
      }
    }
  }

  // The same for a block that is cut by the edge of C or whose columns are not adjacent: nothing outside is
  // touched, neither written nor read.
  static void micro_edge(int64_t k, const T* a, const T* b, T alpha, T beta, T* c, int64_t rs, int64_t cs,
                         int64_t m, int64_t n) {
    T block[MR * NR];
    micro(k, a, b, alpha, T(0), block, NR);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        T& x = c[i * rs + j * cs];
        x = beta == T(0) ? block[i * NR + j] : beta * x + block[i * NR + j];
      }
  }

  // Blocks of kRows x NR: their rows of A and their columns of B stay in the first-level cache.
  static void tile(const Tile<T>& t) {
    for (int64_t k0 = 0; k0 < t.k; k0 += KC) {
      const int64_t kb = least(KC, t.k - k0);
      const T beta = k0 == 0 ? t.beta : T(1);
      const bool last = k0 + kb == t.k;
      for (int64_t i0 = 0; i0 < t.m; i0 += kRows) {
        const int64_t i1 = least(i0 + kRows, t.m), end = t.lower ? least(t.n, i1) : t.n;
        for (int64_t j = 0; j < end; j += NR) {
          const int64_t n = least(NR, t.n - j);
          const T* b = t.b + (j / NR) * t.b_stride + k0 * NR;
          for (int64_t i = i0; i < i1; i += MR) {
            const int64_t m = least(MR, t.m - i);
            if (t.lower && i + m <= j) continue;  // wholly above the diagonal
            const T* a = t.a + (i / MR) * t.a_stride + k0 * MR;
            T* c = t.c + i * t.rs + j * t.cs;
            if (t.cs == 1 && m == MR && n == NR)
              micro(kb, a, b, t.alpha, beta, c, t.rs);
            else
              micro_edge(kb, a, b, t.alpha, beta, c, t.rs, t.cs, m, n);
          }
          if (last && t.mirrored != nullptr) reflect(t, i0, i1, j, j + n);
        }
      }
    }
    if (t.past_cache) order_stores();
  }

  // mirrored[j, i] <- C[i, j], at once, while the block is in the cache. It goes through a dense copy: where
  // rows of C are a power of two apart, the lines of a block compete for few places in the cache.
  static void reflect(const Tile<T>& t, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    const int64_t m = i1 - i0, n = j1 - j0;
    const bool past = t.past_cache && reinterpret_cast<uintptr_t>(t.mirrored + i0) % VB == 0 && t.rs % W == 0;
    if (t.cs != 1 || m % W != 0 || n != NR) {
      for (int64_t j = j0; j < j1; ++j)
        for (int64_t i = i0; i < i1; ++i) t.mirrored[j * t.rs + i * t.cs] = t.c[i * t.rs + j * t.cs];
      return;
    }
    T block[kRows * NR];
    for (int64_t i = 0; i < m; ++i)
      for (int j = 0; j < NR; j += W) store(block + i * NR + j, load(t.c + (i0 + i) * t.rs + j0 + j));
    for (int j = 0; j < NR; j += W)
      for (int64_t i = 0; i < m; i += W)
        if (past)
          transpose<true>(t.mirrored + (j0 + j) * t.rs + i0 + i, t.rs, block + i * NR + j, NR);
        else
          transpose(t.mirrored + (j0 + j) * t.rs + i0 + i, t.rs, block + i * NR + j, NR);
  }

  // R rows of A with N of B; A is read once and never packed.
  template <int R, int N>
  static void dot_block(const T* A, int64_t rs, const T* B, int64_t ldb, int64_t d, T* y, int64_t ldy) {
    V acc[R][N] = {};
    int64_t k = 0;
    for (; k + W <= d; k += W) {
      V b[N];
#pragma GCC unroll 4
      for (int c = 0; c < N; ++c) b[c] = load(B + c * ldb + k);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        const V a = load(A + i * rs + k);
#pragma GCC unroll 4
        for (int c = 0; c < N; ++c) acc[i][c] += a * b[c];
      }
    }
    for (int i = 0; i < R; ++i)
      for (int c = 0; c < N; ++c) {
        T sum = lanes(acc[i][c]);
        for (int64_t p = k; p < d; ++p) sum += A[i * rs + p] * B[c * ldb + p];
        y[c * ldy + i] = sum;
      }
  }

  template <int R>
  static void dot_rows(const T* A, int64_t rs, const T* B, int64_t ldb, int64_t u, int64_t d, T* y,
                       int64_t ldy) {
    constexpr int N = kRegisters == 32 ? 4 : 2;  // R x N sums, N entries of B and one of A in registers
    int64_t c = 0;
    for (; c + N <= u; c += N) dot_block<R, N>(A, rs, B + c * ldb, ldb, d, y + c * ldy, ldy);
    for (; c < u; ++c) dot_block<R, 1>(A, rs, B + c * ldb, ldb, d, y + c * ldy, ldy);
  }

  static void dots(const T* A, int64_t rs, int64_t rows, const T* B, int64_t ldb, int64_t u, int64_t d, T* y,
                   int64_t ldy) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) dot_rows<4>(A + i * rs, rs, B, ldb, u, d, y + i, ldy);
    for (; i < rows; ++i) dot_rows<1>(A + i * rs, rs, B, ldb, u, d, y + i, ldy);
  }

  // N rows of A with S vectors of a row of B side by side; B is read once, a strip of it at a time.
  template <int N, int S>
  static void combine_strip(const T* A, int64_t lda, const T* B, int64_t ldb, int64_t d, T* y, int64_t ldy) {
    constexpr int kAhead = 16;  // rows of B
    V acc[N][S] = {};
    for (int64_t k = 0; k < d; ++k, B += ldb) {
      for (int s = 0; s < S * W; s += kLine) __builtin_prefetch(B + kAhead * ldb + s);
#pragma GCC unroll 12
      for (int s = 0; s < S; ++s) {
        const V b = load(B + s * W);
#pragma GCC unroll 4
        for (int c = 0; c < N; ++c) acc[c][s] += A[c * lda + k] * b;
      }
    }
    for (int c = 0; c < N; ++c)
      for (int s = 0; s < S; ++s) store(y + c * ldy + s * W, acc[c][s]);
  }

  static void combine(const T* A, int64_t lda, int64_t u, const T* B, int64_t ldb, int64_t d, int64_t n, T* y,
                      int64_t ldy) {
    constexpr int N = kRegisters == 32 ? 4 : 2, S = 4;
    int64_t j = 0;
    // Fewer rows of A than are taken side by side: rather longer pieces of each row of B.
    if (u == 1) {
      constexpr int kWide = VB == 64 ? 12 : 8;
      for (; j + kWide * W <= n; j += kWide * W) combine_strip<1, kWide>(A, lda, B + j, ldb, d, y + j, ldy);
    } else if (N == 4 && u == 2) {
      for (; j + 6 * W <= n; j += 6 * W) combine_strip<2, 6>(A, lda, B + j, ldb, d, y + j, ldy);
    } else if (N == 4 && u == 3) {
      for (; j + S * W <= n; j += S * W) combine_strip<3, S>(A, lda, B + j, ldb, d, y + j, ldy);
    }
    for (; j + S * W <= n; j += S * W) {
      int64_t c = 0;
      for (; c + N <= u; c += N) combine_strip<N, S>(A + c * lda, lda, B + j, ldb, d, y + c * ldy + j, ldy);
      for (; c < u; ++c) combine_strip<1, S>(A + c * lda, lda, B + j, ldb, d, y + c * ldy + j, ldy);
    }
    for (; j < n; ++j)
      for (int64_t c = 0; c < u; ++c) {
        T sum = T(0);
        for (int64_t k = 0; k < d; ++k) sum += A[c * lda + k] * B[k * ldb + j];
        y[c * ldy + j] = sum;
      }
  }

  // R rows of C at a time share what is loaded of B. C is rounded once, and not by every column of A.
  template <int R>
  static void add_few_rows(T* C, int64_t ldc, int64_t n, const T* A, int64_t lda, const T* B, int64_t ldb,
                           int64_t u) {
    int64_t j = 0;
    for (; j + 2 * W <= n; j += 2 * W) {
      V acc[R][2];
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) acc[i][0] = acc[i][1] = V{};
      for (int64_t c = 0; c < u; ++c) {
        const V b0 = load(B + c * ldb + j), b1 = load(B + c * ldb + j + W);
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) {
          acc[i][0] += A[i * lda + c] * b0;
          acc[i][1] += A[i * lda + c] * b1;
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        T* to = C + i * ldc + j;
        store(to, load(to) + acc[i][0]), store(to + W, load(to + W) + acc[i][1]);
      }
    }
    for (; j < n; ++j)
      for (int i = 0; i < R; ++i) {
        T sum = T(0);
        for (int64_t c = 0; c < u; ++c) sum += A[i * lda + c] * B[c * ldb + j];
        C[i * ldc + j] += sum;
      }
  }

  static void add_few(T* C, int64_t ldc, int64_t rows, int64_t n, const T* A, int64_t lda, const T* B,
                      int64_t ldb, int64_t u) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) add_few_rows<4>(C + i * ldc, ldc, n, A + i * lda, lda, B, ldb, u);
    for (; i < rows; ++i) add_few_rows<1>(C + i * ldc, ldc, n, A + i * lda, lda, B, ldb, u);
  }

  // ---- layout ---------------------------------------------------------------------------------------------

  // One step of the butterfly that transposes W x W: exchange off-diagonal S x S blocks of two rows.
  typedef decltype(V{} < V{}) Index;
  template <int S>
  static void exchange(V& x, V& y) {
    Index low, high;
    for (int i = 0; i < W; ++i) {
      const bool odd = (i / S) % 2 != 0;
      low[i] = odd ? W + i - S : i;
      high[i] = odd ? W + i : i + S;
    }
#if defined(__clang__)
    V a, b;  // clang has no shuffle with a variable index; it folds this loop into one
    for (int i = 0; i < W; ++i) {
      a[i] = low[i] < W ? x[low[i]] : y[low[i] - W];
      b[i] = high[i] < W ? x[high[i]] : y[high[i] - W];
    }
#else
    const V a = __builtin_shuffle(x, y, low), b = __builtin_shuffle(x, y, high);
#endif
    x = a;
    y = b;
  }

  template <int S>
  static void transpose_step(V* r) {
    if constexpr (S > 0) {
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i)
        if ((i & S) == 0) exchange<S>(r[i], r[i + S]);
      transpose_step<S / 2>(r);
    }
  }

  // dst[j, i] <- src[i, j], W x W
  template <bool PAST_CACHE = false>
  static void transpose(T* dst, int64_t ldd, const T* src, int64_t lds) {
    V r[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) r[i] = load(src + i * lds);
    transpose_step<W / 2>(r);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if constexpr (PAST_CACHE)
        store_past_cache(dst + i * ldd, r[i]);
      else
        store(dst + i * ldd, r[i]);
  }

  template <int R>
  static void pack(T* dst, int64_t panel_stride, const T* src, int64_t rows, int64_t k, int64_t rs,
                   int64_t cs) {
    for (int64_t r0 = 0; r0 < rows; r0 += R, dst += panel_stride, src += R * rs) {
      const int64_t n = least(R, rows - r0);
      int64_t p = 0;
      if (n == R && cs == 1 && rs != 1 && R % W == 0)
        for (; p + W <= k; p += W)
          for (int r = 0; r < R; r += W) transpose(dst + p * R + r, R, src + r * rs + p, rs);
      if (n == R && rs == 1 && R % W == 0)
        for (; p < k; ++p)
          for (int r = 0; r < R; r += W) store(dst + p * R + r, load(src + p * cs + r));
      for (; p < k; ++p) {
        for (int64_t r = 0; r < n; ++r) dst[p * R + r] = src[r * rs + p * cs];
        for (int64_t r = n; r < R; ++r) dst[p * R + r] = T(0);
      }
    }
  }

  static void unpack_right(T* dst, int64_t ld, const T* panel, int64_t rows, int64_t k) {
    int64_t p = 0;
    if (rows == NR)
      for (; p + W <= k; p += W)
        for (int r = 0; r < NR; r += W) transpose(dst + r * ld + p, ld, panel + p * NR + r, NR);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t q = p; q < k; ++q) dst[r * ld + q] = panel[q * NR + r];
  }

  static void mirror(T* c, int64_t rs, int64_t cs, int64_t n) {
    for (int64_t i = 0; i < n; i += W)
      for (int64_t j = 0; j <= i; j += W) {
        if (cs == 1 && i + W <= n && j < i) {
          transpose(c + j * rs + i, rs, c + i * rs + j, rs);
          continue;
        }
        for (int64_t x = i; x < least(i + W, n); ++x)
          for (int64_t y = j; y < least(j + W, x); ++y) c[y * rs + x * cs] = c[x * rs + y * cs];
      }
  }

  // ---- triangular solves and the factor -------------------------------------------------------------------

  // Four unknowns at a time, for the NR right-hand sides of a panel side by side: the loads of x[p] are
  // shared.
  static void solve_lower(T* x, const T* L, int64_t ld, int64_t u) {
    for (int64_t i = 0; i < u; i += 4) {
      const int64_t n = least(4, u - i);
      V acc[4][2] = {};
      if (n == 4) {
        const T* l = L + i * ld;
        for (int64_t p = 0; p < i; ++p) {
          const V x0 = load(x + p * NR), x1 = load(x + p * NR + W);
#pragma GCC unroll 4
          for (int r = 0; r < 4; ++r) {
            acc[r][0] += l[r * ld + p] * x0;
            acc[r][1] += l[r * ld + p] * x1;
          }
        }
      } else {
        for (int64_t p = 0; p < i; ++p)
          for (int64_t r = 0; r < n; ++r) {
            acc[r][0] += L[(i + r) * ld + p] * load(x + p * NR);
            acc[r][1] += L[(i + r) * ld + p] * load(x + p * NR + W);
          }
      }
      for (int64_t r = 0; r < n; ++r)
        finish(x, L + (i + r) * ld, 1, L[(i + r) * ld + i + r], acc[r], i + r, i, i + r);
    }
  }

  static void solve_upper(T* x, const T* L, int64_t ld, int64_t u) {
    for (int64_t end = u; end > 0; end -= least(4, end)) {
      const int64_t n = least(4, end), i = end - n;
      V acc[4][2] = {};
      if (n == 4) {
        for (int64_t p = end; p < u; ++p) {
          const V x0 = load(x + p * NR), x1 = load(x + p * NR + W);
          const T* l = L + p * ld + i;
#pragma GCC unroll 4
          for (int r = 0; r < 4; ++r) {
            acc[r][0] += l[r] * x0;
            acc[r][1] += l[r] * x1;
          }
        }
      } else {
        for (int64_t p = end; p < u; ++p)
          for (int64_t r = 0; r < n; ++r) {
            acc[r][0] += L[p * ld + i + r] * load(x + p * NR);
            acc[r][1] += L[p * ld + i + r] * load(x + p * NR + W);
          }
      }
      for (int64_t r = n - 1; r >= 0; --r)
        finish(x, L + i + r, ld, L[(i + r) * ld + i + r], acc[r], i + r, i + r + 1, end);
    }
  }

  // x[row] <- (x[row] - acc - sum_{p in [p0, p1)} l[p * step] x[p]) / pivot
  static void finish(T* x, const T* l, int64_t step, T pivot, V* acc, int64_t row, int64_t p0, int64_t p1) {
    for (int64_t p = p0; p < p1; ++p) {
      acc[0] += l[p * step] * load(x + p * NR);
      acc[1] += l[p * step] * load(x + p * NR + W);
    }
    T* y = x + row * NR;
    store(y, (load(y) - acc[0]) / splat(pivot));
    store(y + W, (load(y + W) - acc[1]) / splat(pivot));
  }

  // Left-looking on the transposed copy: the inner loop runs along contiguous memory, and what an element
  // loses to the rows above is summed from zero and subtracted once (solve_columns says why).
  static int64_t factor(T* A, int64_t ld, int64_t n) {
    T t[kFactorBlock * kFactorBlock];
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j <= i; ++j) t[j * kFactorBlock + i] = A[i * ld + j];
    int64_t info = 0;
    for (int64_t j = 0; j < n; ++j) {
      T lost[kFactorBlock] = {};
      for (int64_t k = 0; k < j; ++k) {
        const T* __restrict above = t + k * kFactorBlock;
        const T factor = above[j];
        for (int64_t p = j; p < n; ++p) lost[p] += factor * above[p];
      }
      T* __restrict row = t + j * kFactorBlock;
      const T pivot = row[j] - lost[j];
      if (!(pivot > T(0)) || pivot - pivot != T(0)) {  // not positive, NaN or infinite
        info = j + 1;
        break;
      }
      const T root = sizeof(T) == 4 ? static_cast<T>(__builtin_sqrtf(static_cast<float>(pivot)))
                                    : static_cast<T>(__builtin_sqrt(static_cast<double>(pivot)));
      row[j] = root;
      for (int64_t i = j + 1; i < n; ++i) row[i] = (row[i] - lost[i]) / root;
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j <= i; ++j) A[i * ld + j] = t[j * kFactorBlock + i];
    return info;
  }

  // ---- block reflectors -----------------------------------------------------------------------------------

  typedef typename Vector<double, VB * (8 / static_cast<int>(sizeof(T)))>::type D;  // W of them

  // Sum of squares in float64: no float32 overflows there or vanishes.
  static double square_sum(const T* x, int64_t u) {
    D acc = {};
    for (int64_t i = 0; i < u; i += W) {
      const D v = __builtin_convertvector(load(x + i), D);
      acc += v * v;
    }
    double sum = 0.0;
    for (int i = 0; i < W; ++i) sum += acc[i];
    return sum;
  }

  static T lanes(V acc) {
    T sum = T(0);
    for (int i = 0; i < W; ++i) sum += acc[i];
    return sum;
  }

  // |x|; a vector whose squares leave the range of float64 is scaled first.
  static double norm(const T* x, int64_t u) {
    const double sum = square_sum(x, u);
    if (sum > 1e-280 && sum < 1e280) return __builtin_sqrt(sum);
    double largest = 0.0, scaled = 0.0;
    for (int64_t i = 0; i < u; ++i) {
      const double size = __builtin_fabs(static_cast<double>(x[i]));
      largest = size > largest || size != size ? size : largest;
    }
    if (!(largest > 0.0) || largest - largest != 0.0) return largest;  // zero, infinite or NaN
    for (int64_t i = 0; i < u; ++i) {
      const double part = static_cast<double>(x[i]) / largest;
      scaled += part * part;
    }
    return largest * __builtin_sqrt(scaled);
  }

  // The reflector of x on the columns [c0, c1): q = x'y, a_new = a + tau (q - square a), y <- y - x (a +
  // a_new).
  static void reflect_columns(const T* x, T square, T tau, T* X, int64_t ldx, int64_t u, T* a, int64_t c0,
                              int64_t c1) {
    for (int64_t c = c0; c < c1; c += 4) {
      const int64_t n = least(4, c1 - c);
      V acc[4] = {};
      if (n == 4) {
        const T* y = X + c * ldx;
        for (int64_t i = 0; i < u; i += W) {
          const V v = load(x + i);
#pragma GCC unroll 4
          for (int r = 0; r < 4; ++r) acc[r] += v * load(y + r * ldx + i);
        }
      } else {
        for (int64_t r = 0; r < n; ++r)
          for (int64_t i = 0; i < u; i += W) acc[r] += load(x + i) * load(X + (c + r) * ldx + i);
      }
      for (int64_t r = 0; r < n; ++r) {
        const T old = a[c + r];
        a[c + r] += tau * (lanes(acc[r]) - square * old);
        const T w = old + a[c + r];
        T* y = X + (c + r) * ldx;
        for (int64_t i = 0; i < u; i += W) store(y + i, load(y + i) - w * load(x + i));
      }
    }
  }

  static void reflect(T* A, int64_t ld, T* X, T* Y, int64_t ldx, int64_t u, int64_t n, T* E) {
    T S[kReflectors * kReflectors], M[kReflectors * kReflectors];
    for (int64_t i = 0; i < n * n; ++i) S[i] = M[i] = T(0);
    for (int64_t j = 0; j < n; ++j) {
      T *x = X + j * ldx, *a = A + j * ld;
      const double alpha = static_cast<double>(a[j]), sigma = norm(x, u);
      if (sigma == 0.0) continue;
      const double r = __builtin_hypot(alpha, sigma);
      for (int64_t i = 0; i < u; ++i) x[i] = static_cast<T>(static_cast<double>(x[i]) / (alpha + r));
      const double square = square_sum(x, u);  // of the rounded vector: tau makes its reflector orthogonal
      const T tau = static_cast<T>(2.0 / (1.0 + square));
      a[j] = static_cast<T>(r);
      reflect_columns(x, static_cast<T>(square), tau, X, ldx, u, a, j + 1, n);
      // S[:j, j] = -tau S[:j, :j] g with g = X[:, :j]'x
      S[j * n + j] = tau;
      M[j * n + j] = static_cast<T>(square);
      T g[kReflectors];
      for (int64_t i = 0; i < j; ++i) {
        V acc = {};
        for (int64_t p = 0; p < u; p += W) acc += load(X + i * ldx + p) * load(x + p);
        g[i] = lanes(acc);
        M[j * n + i] = 2 * g[i];
      }
      for (int64_t i = 0; i < j; ++i) {
        T sum = T(0);
        for (int64_t p = i; p < j; ++p) sum += S[i * n + p] * g[p];
        S[i * n + j] = -tau * sum;
      }
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        T sum = T(0);
        for (int64_t p = j; p <= i; ++p) sum += M[i * n + p] * S[j * n + p];
        E[i * n + j] = sum;
      }
    for (int64_t j = 0; j < n; ++j) {
      T* y = Y + j * ldx;
      for (int64_t p = 0; p < u; p += W) {
        V acc = {};
        for (int64_t i = 0; i <= j; ++i) acc += S[i * n + j] * load(X + i * ldx + p);
        store(y + p, acc);
      }
    }
  }

  // Column by column, by substitution. What the solved ones take is summed from zero and subtracted once:
  // with a factor near the identity the sum is small, and so are its roundings.
  static void solve_columns(T* X, int64_t ldx, int64_t u, const T* A, int64_t ld, int64_t n,
                            bool transposed) {
    for (int64_t s = 0; s < n; ++s) {
      const int64_t j = transposed ? n - 1 - s : s;
      const int64_t first = transposed ? j + 1 : 0, last = transposed ? n : j;
      const V pivot = splat(A[j * ld + j]);
      for (int64_t p = 0; p < u; p += W) {
        V lost = splat(T(0));
        for (int64_t i = first; i < last; ++i)
          lost += (transposed ? A[j * ld + i] : A[i * ld + j]) * load(X + i * ldx + p);
        store(X + j * ldx + p, (load(X + j * ldx + p) - lost) / pivot);
      }
    }
  }

  static constexpr Engine<T> table(const char* name) {
    constexpr int64_t few = VB == 64 ? 16 : 8;
    return {name, MR,      NR,      KC,     few,         pack<MR>,    pack<NR>, unpack_right, tile,
            dots, combine, add_few, mirror, solve_lower, solve_upper, factor,   reflect,      solve_columns};
  }
};

}  // namespace
}  // namespace rlsedit
