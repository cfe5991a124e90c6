#define SK_ISA_TABLE avx2_table
#include "kernels.h"
