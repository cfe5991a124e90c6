#define SK_ISA_TABLE baseline_table
#include "kernels.h"
