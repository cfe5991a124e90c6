#define SK_ISA_TABLE avx512_table
#include "kernels.h"
