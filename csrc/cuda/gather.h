// Matrices of any strides copied into contiguous ones.
#pragma once

#include "matrices.h"

namespace rlsedit {

template <class T>
__global__ void __launch_bounds__(256)
    gather_kernel(Matrices<const T> from, int64_t first, T* to, int64_t rows, int64_t columns) {
  const int64_t b = blockIdx.z, i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i < rows * columns) to[b * rows * columns + i] = from[b].at(first + i / columns, i % columns);
}

// to (b, rows, columns) <- rows [first, first + rows) of every matrix.
template <class T>
void gather(Stream stream, int64_t batch, Matrices<const T> from, int64_t first, T* to, int64_t rows,
            int64_t columns) {
  launch(gather_kernel<T>,
         dim3(static_cast<unsigned>(ceil_div(rows * columns, 256)), 1, static_cast<unsigned>(batch)), 256, 0,
         stream, from, first, to, rows, columns);
}

}  // namespace rlsedit
