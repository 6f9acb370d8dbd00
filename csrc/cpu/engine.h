// The product engine: a handful of small kernels, compiled once per instruction set, that every op is made
// of.
//
// Why not a BLAS: torch's wheel exports no syrk, a second BLAS brings a second thread pool that spins against
// torch's, and global switches (bf16 "medium" precision) reach torch's own products. Here each result element
// is computed by one thread in one fixed order, so results do not depend on the number of threads.
//
// Packed operands. A "left" operand (m x k) is stored in panels of mr rows, a "right" operand (n x k) in
// panels of nr rows; inside a panel the mr (nr) entries of one column lie side by side, zero-padded at the
// end:
//   panel(i)[p * mr + r] = A[i * mr + r, p]
#pragma once

#include <cstdint>

namespace rlsedit {

// Columns of k that one pass of a micro-kernel takes: its nr-wide panel then stays in the first-level cache.
constexpr int64_t kBlockBytes = 16 * 1024;

// C (m x n, any strides) <- beta C + alpha A B'. With beta = 0, C is written without being read.
template <class T>
struct Tile {
  const T* a;        // first panel of the left operand
  int64_t a_stride;  // from one left panel to the next
  const T* b;        // first panel of the right operand
  int64_t b_stride;  // from one right panel to the next
  int64_t m, n, k;
  T alpha, beta;
  T* c;
  int64_t rs, cs;  // strides of C
  bool lower;      // C is a diagonal tile: blocks wholly above the diagonal are left out
  T* mirrored;     // where the transposed tile goes as well (same strides), or null
  bool past_cache =
      false;  // the mirrored tile is not read again soon: it is written to memory, not fetched first
};

template <class T>
struct Engine {
  const char* name;
  int64_t mr, nr;  // rows of a left and of a right panel
  int64_t kc;      // columns taken at a time
  int64_t few;     // up to so many keys reading the matrix decides: it is not packed

  // src (rows x k, strides rs and cs) -> panels, panel_stride apart; the last panel is padded with zeros
  void (*pack_left)(T* dst, int64_t panel_stride, const T* src, int64_t rows, int64_t k, int64_t rs,
                    int64_t cs);
  void (*pack_right)(T* dst, int64_t panel_stride, const T* src, int64_t rows, int64_t k, int64_t rs,
                     int64_t cs);
  // one right panel -> dst (rows <= nr, k), row-major with stride ld
  void (*unpack_right)(T* dst, int64_t ld, const T* panel, int64_t rows, int64_t k);

  void (*tile)(const Tile<T>& t);
  // y[c * ldy + i] = sum over k of A[i, k] B[c, k]; rows of A and B (d adjacent entries) rs and ldb apart.
  void (*dots)(const T* A, int64_t rs, int64_t rows, const T* B, int64_t ldb, int64_t u, int64_t d, T* y,
               int64_t ldy);
  // y[c * ldy + j] = sum over k of A[c, k] B[k, j]; rows of A (d entries) and of B (n entries) adjacent.
  void (*combine)(const T* A, int64_t lda, int64_t u, const T* B, int64_t ldb, int64_t d, int64_t n, T* y,
                  int64_t ldy);
  // C (rows x n) += A (rows x u) B (u x n), row-major, for small u.
  void (*add_few)(T* C, int64_t ldc, int64_t rows, int64_t n, const T* A, int64_t lda, const T* B,
                  int64_t ldb, int64_t u);
  // The upper triangle of C (n x n) from its lower one.
  void (*mirror)(T* c, int64_t rs, int64_t cs, int64_t n);

  // One right panel X (u entries per row), in place: x <- L^-1 x, and x <- L^-T x; L (u, u) row-major.
  void (*solve_lower)(T* panel, const T* L, int64_t ld, int64_t u);
  void (*solve_upper)(T* panel, const T* L, int64_t ld, int64_t u);

  // Unblocked Cholesky factor of the lower triangle of A (n <= 64, row-major) in place.
  // Returns 0, or the order (1-based) of the first leading minor that is not positive definite or not finite.
  int64_t (*factor)(T* A, int64_t ld, int64_t n);

  // Columns of u entries, ldx apart (a multiple of kColumnStep), zero beyond u: X[c * ldx + i].
  // Block reflector that maps [A; X] (A upper triangular n x n with a diagonal >= 0, n <= kReflectors) to
  // [A_new; 0], the diagonal of A_new >= 0; see reflectors.h. X becomes its lower part, Y = X S laid out as
  // X, and E = 2 I - S' (n x n row-major).
  void (*reflect)(T* A, int64_t ld, T* X, T* Y, int64_t ldx, int64_t u, int64_t n, T* E);
  // X <- X A^-1, or X A^-T where `transposed`, for an upper triangular A (n x n row-major).
  void (*solve_columns)(T* X, int64_t ldx, int64_t u, const T* A, int64_t ld, int64_t n, bool transposed);
};

constexpr int64_t kFactorBlock = 64;
constexpr int64_t kReflectors = 64;
constexpr int64_t kColumnStep = 16;
constexpr int64_t kMostNr = 32, kMostFew = 16;  // of any engine

// The engine of the best instruction set that this processor has; RLSEDIT_CPU_ENGINE=baseline or =avx2 asks
// for an older one.
template <class T>
const Engine<T>& engine();

// One instruction set each; nullptr where it was not compiled in.
template <class T>
const Engine<T>* baseline_engine();
template <class T>
const Engine<T>* avx2_engine();
template <class T>
const Engine<T>* avx512_engine();

}  // namespace rlsedit
