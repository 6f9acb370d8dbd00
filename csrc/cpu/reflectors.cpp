#include "reflectors.h"

#include <vector>

#include "products.h"
#include "sweep.h"

namespace rlsedit {
namespace {

constexpr int64_t kMostRows = 256;  // appended at a time: a slab of them stays in the first-level cache

// One block reflector, for any columns R (n), K (u): D = (X S)'K - E R, K <- K - X (2 R + D), R <- R + D.
template <class T>
struct Reflector {
  int64_t row, n;
  Panels<T> rows, upper, lower;  // (X S)' (n x u), E (n x n), X (u x n): left operands
  T sign[kReflectors];           // rows of R whose diagonal was negative are negated on the way

  Reflector(int64_t row, int64_t n, int64_t u)
      : row(row),
        n(n),
        rows(n, u, engine<T>().mr, engine<T>().mr * u),
        upper(n, n, engine<T>().mr, engine<T>().mr * n),
        lower(u, n, engine<T>().mr, engine<T>().mr * n) {}
};

template <class T>
class Append {
 public:
  Append(Matrix<T> R, int64_t d, Matrix<const T> K, int64_t u, Matrix<T> B, Matrix<const T> V, int64_t v)
      : R_(R), d_(d), u_(u), B_(B), v_(v), keys_(K, u, d), targets_(V, u, v) {}

  void run() {
    const int64_t blocks = count(d_), others = v_ > 0 ? count(v_) : 0;
    sweep(
        blocks, others, [&](int64_t p) { factor(p); },
        [&](int64_t p, int64_t q) {
          for (const Reflector<T>& h : reflectors_[p % 2]) {
            if (q < blocks)
              apply(h, R_, keys_, q * kBlockColumns);
            else
              apply(h, B_, targets_, (q - blocks) * kBlockColumns);
          }
        });
  }

 private:
  static int64_t count(int64_t n) { return (n + kBlockColumns - 1) / kBlockColumns; }

  // Few rows are better served by narrow reflectors: S costs n for every element of R, the rows u. Whole
  // slabs.
  int64_t width() const {
    if (engine<T>().nr > 16) return u_ <= 64 ? 32 : 64;
    return u_ <= 24 ? 16 : u_ <= 64 ? 32 : 48;
  }

  void factor(int64_t p) {
    std::vector<Reflector<T>>& made = reflectors_[p % 2];
    made.clear();
    const int64_t begin = p * kBlockColumns, end = std::min(d_, begin + kBlockColumns);
    for (int64_t row = begin; row < end; row += width()) {
      made.push_back(reflect(row, std::min(width(), end - row)));
      for (int64_t column = row + width(); column < end; column += engine<T>().nr)
        apply_slab(made.back(), R_, keys_, column);
    }
  }

  Reflector<T> reflect(int64_t row, int64_t n) {
    const Engine<T>& e = engine<T>();
    const int64_t ldx = column_distance(u_);
    Reflector<T> h(row, n, u_);
    const Scratch<T> X(2 * n * ldx);
    T *Y = X.get() + n * ldx, A[kReflectors * kReflectors], E[kReflectors * kReflectors];
    keys_.gather(row, n, X.get(), ldx);
    for (int64_t i = 0; i < n; ++i) {
      h.sign[i] = *R_.at(row + i, row + i) < T(0) ? T(-1) : T(1);
      for (int64_t j = i; j < n; ++j) A[i * n + j] = h.sign[i] * *R_.at(row + i, row + j);
    }
    e.reflect(A, n, X.get(), Y, ldx, u_, n, E);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = i; j < n; ++j) *R_.at(row + i, row + j) = A[i * n + j];
    e.pack_left(h.rows.panel(0), h.rows.stride, Y, n, u_, ldx, 1);
    e.pack_left(h.upper.panel(0), h.upper.stride, E, n, n, n, 1);
    e.pack_left(h.lower.panel(0), h.lower.stride, X.get(), u_, n, 1, ldx);
    return h;
  }

  void apply(const Reflector<T>& h, Matrix<T> A, const Slabs<T>& rows, int64_t begin) const {
    const int64_t end = std::min(rows.n, begin + kBlockColumns);
    for (int64_t column = begin; column < end; column += engine<T>().nr) apply_slab(h, A, rows, column);
  }

  void apply_slab(const Reflector<T>& h, Matrix<T> A, const Slabs<T>& rows, int64_t column) const {
    const Engine<T>& e = engine<T>();
    const int64_t width = std::min(e.nr, rows.n - column), padded = Slabs<T>::padded(h.n);
    alignas(64) T top[kReflectors * kMostNr], D[(kReflectors + 8) * kMostNr];
    T* slab = rows.slab(column / e.nr);
    const Matrix<T> at{A.at(h.row, column), A.rs, A.cs};
    load_block<T>(top, e.nr, {at.data, at.rs, at.cs}, h.n, width);
    if (column + 2 * e.nr <= rows.n)  // rows of A are far apart: no hardware sees what comes next
      for (int64_t i = 0; i < h.n; ++i) __builtin_prefetch(at.at(i, e.nr), 1);
    for (int64_t i = 0; i < h.n; ++i)
      if (h.sign[i] < T(0))
        for (int64_t j = 0; j < e.nr; ++j) top[i * e.nr + j] = -top[i * e.nr + j];
    e.tile({h.upper.panel(0), h.upper.stride, top, 0, padded, e.nr, h.n, T(-1), T(0), D, e.nr, 1, false,
            nullptr});
    e.tile(
        {h.rows.panel(0), h.rows.stride, slab, 0, padded, e.nr, u_, T(1), T(1), D, e.nr, 1, false, nullptr});
    for (int64_t i = 0; i < h.n; ++i) {
      T *from = top + i * e.nr, *change = D + i * e.nr;
      for (int64_t j = 0; j < e.nr; ++j) {
        const T old = from[j];
        from[j] += change[j];
        change[j] = old + from[j];
      }
      if (at.cs == 1)
        std::memcpy(at.at(i, 0), from, static_cast<size_t>(width) * sizeof(T));
      else
        for (int64_t j = 0; j < width; ++j) *at.at(i, j) = from[j];
    }
    e.tile({h.lower.panel(0), h.lower.stride, D, 0, Slabs<T>::padded(u_), e.nr, h.n, T(-1), T(1), slab, e.nr,
            1, false, nullptr});
  }

  Matrix<T> R_;
  int64_t d_, u_;
  Matrix<T> B_;
  int64_t v_;
  Slabs<T> keys_, targets_;
  std::vector<Reflector<T>> reflectors_[2];  // of this block of columns, and of the next
};

}  // namespace

template <class T>
void append_rows(Matrix<T> R, int64_t d, Matrix<const T> K, int64_t u, Matrix<T> B, Matrix<const T> V,
                 int64_t v) {
  const int64_t parts = (u + kMostRows - 1) / kMostRows, step = (u + parts - 1) / parts;
  for (int64_t i = 0; i < u; i += step)
    Append<T>(R, d, {K.at(i, 0), K.rs, K.cs}, std::min(step, u - i), B, {V.at(i, 0), V.rs, V.cs}, v).run();
}

template void append_rows(Matrix<float>, int64_t, Matrix<const float>, int64_t, Matrix<float>,
                          Matrix<const float>, int64_t);
template void append_rows(Matrix<double>, int64_t, Matrix<const double>, int64_t, Matrix<double>,
                          Matrix<const double>, int64_t);

}  // namespace rlsedit
