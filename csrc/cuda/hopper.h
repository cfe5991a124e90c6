// The products of square blocks of 32, 64 and 128 in 16 bits on compute capability 9.0, in
// spmm_hopper_32.cu, spmm_hopper.cu and sddmm_hopper.cu.
#pragma once

#include "kernels.h"

namespace sk {
namespace cuda {

void spmm_hopper(const char* product, DType dtype, const Lists& lists, const Operand& x,
                 const void* values, const void* bias, void* out, int64_t tokens,
                 const Queue& queue);

// Of blocks of 32; `lists` have groups.
void spmm_hopper_32(const char* product, DType dtype, const Lists& lists, const Operand& x,
                    const void* values, const void* bias, void* out, int64_t tokens,
                    const Queue& queue);

// The parts that sddmm_hopper cuts the tokens into, or 0: then it needs no second pass.
int64_t sddmm_hopper_parts(const Lists& lists, int64_t tokens);

// The sums of each part, for all elements of grad_values; grad_values itself if there are none.
void sddmm_hopper(DType dtype, const Lists& lists, const Operand& grad_output, const Operand& x,
                  float* partial, void* grad_values, int64_t parts, int64_t tokens,
                  const Queue& queue);

}  // namespace cuda
}  // namespace sk
