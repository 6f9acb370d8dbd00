#include "reflectors.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "products.h"
#include "sweep.h"

namespace rlsedit {
namespace {

constexpr int64_t kMostRows = 256;  // appended at a time: a slab of them stays in the first-level cache

// One block reflector, for any columns R (n), K (u): D = (X S)'K - E R, K <- K - X (2 R + D), R <- R + D.
template <class T>
struct Reflector {
  int64_t row = 0, n = 0;
  Panels<T> rows, upper, lower;  // (X S)' (n x u), E (n x n), X (u x n): left operands
  T sign[kReflectors];           // rows of R whose diagonal was negative are negated on the way

  Reflector(int64_t most, int64_t u)
      : rows(left_size<T>(most, u)), upper(left_size<T>(most, most)), lower(left_size<T>(u, most)) {}

  void shape(int64_t new_row, int64_t new_n, int64_t u) {
    const int64_t mr = engine<T>().mr;
    row = new_row, n = new_n;
    rows.shape(n, u, mr, mr * u);
    upper.shape(n, n, mr, mr * n);
    lower.shape(u, n, mr, mr * n);
  }
};

}  // namespace

// At most `most` rows at a time.
template <class T>
class Append<T>::Part {
 public:
  Part(int64_t d, int64_t most, int64_t v)
      : d_(d),
        v_(v),
        width_(width(most)),
        keys_(most, d),
        targets_(most, v),
        columns_(2 * width_ * column_distance(most)) {
    const int64_t blocks = std::min<int64_t>(2, count(d)),
                  each = (std::min(d, kBlockColumns) + width_ - 1) / width_;
    for (int64_t p = 0; p < blocks; ++p)
      for (int64_t i = 0; i < each; ++i) reflectors_[p].emplace_back(width_, most);
  }

  void run(Matrix<T> R, Matrix<const T> K, int64_t u, Matrix<T> B, Matrix<const T> V) {
    R_ = R, B_ = B, u_ = u;
    keys_.fill(K, u);
    targets_.fill(V, u);
    const int64_t blocks = count(d_), others = v_ > 0 ? count(v_) : 0;
    sweep(
        blocks, others, [&](int64_t p) { factor(p); },
        [&](int64_t p, int64_t q) {
          for (int64_t i = 0; i < made_[p % 2]; ++i) {
            const Reflector<T>& h = reflectors_[p % 2][static_cast<size_t>(i)];
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
  static int64_t width(int64_t u) {
    if (engine<T>().nr > 16) return u <= 64 ? 32 : 64;
    return u <= 24 ? 16 : u <= 64 ? 32 : 48;
  }

  void factor(int64_t p) {
    int64_t& made = made_[p % 2] = 0;
    const int64_t begin = p * kBlockColumns, end = std::min(d_, begin + kBlockColumns);
    for (int64_t row = begin; row < end; row += width_) {
      Reflector<T>& h = reflectors_[p % 2][static_cast<size_t>(made++)];
      h.shape(row, std::min(width_, end - row), u_);
      reflect(h);
      for (int64_t column = row + width_; column < end; column += engine<T>().nr)
        apply_slab(h, R_, keys_, column);
    }
  }

  void reflect(Reflector<T>& h) const {
    const Engine<T>& e = engine<T>();
    const int64_t row = h.row, n = h.n, ldx = column_distance(u_);
    T *X = columns_.get(), *Y = X + n * ldx, A[kReflectors * kReflectors], E[kReflectors * kReflectors];
    keys_.gather(row, n, X, ldx);
    for (int64_t i = 0; i < n; ++i) {
      h.sign[i] = *R_.at(row + i, row + i) < T(0) ? T(-1) : T(1);
      for (int64_t j = i; j < n; ++j) A[i * n + j] = h.sign[i] * *R_.at(row + i, row + j);
    }
    e.reflect(A, n, X, Y, ldx, u_, n, E);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = i; j < n; ++j) *R_.at(row + i, row + j) = A[i * n + j];
    e.pack_left(h.rows.panel(0), h.rows.stride, Y, n, u_, ldx, 1);
    e.pack_left(h.upper.panel(0), h.upper.stride, E, n, n, n, 1);
    e.pack_left(h.lower.panel(0), h.lower.stride, X, u_, n, 1, ldx);
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

  int64_t d_, v_, width_, u_ = 0;
  Matrix<T> R_{}, B_{};
  Slabs<T> keys_, targets_;
  Scratch<T> columns_;
  std::vector<Reflector<T>> reflectors_[2];  // of this block of columns, and of the next
  int64_t made_[2] = {0, 0};
};

namespace {

int64_t rows_at_a_time(int64_t u) {
  const int64_t parts = (u + kMostRows - 1) / kMostRows;
  return (u + parts - 1) / parts;
}

}  // namespace

template <class T>
Append<T>::Append(int64_t d, int64_t u, int64_t v) : u_(u), part_(new Part(d, rows_at_a_time(u), v)) {}

template <class T>
Append<T>::~Append() = default;

template <class T>
Append<T>::Append(Append&&) noexcept = default;

template <class T>
void Append<T>::run(Matrix<T> R, Matrix<const T> K, Matrix<T> B, Matrix<const T> V) {
  const int64_t step = rows_at_a_time(u_);
  for (int64_t i = 0; i < u_; i += step)
    part_->run(R, {K.at(i, 0), K.rs, K.cs}, std::min(step, u_ - i), B, {V.at(i, 0), V.rs, V.cs});
}

template class Append<float>;
template class Append<double>;

}  // namespace rlsedit
