#define SK_ISA_TABLE avx512_bf16_table
#include "kernels.h"
