// Asks the driver and the runtime about themselves.
#include "launch.cuh"

namespace sk {
namespace cuda {

int driver_version() {
    int version = 0;
    check(cudaDriverGetVersion(&version), "asking for the driver's version");
    return version;
}

int runtime_version() {
    int version = 0;
    check(cudaRuntimeGetVersion(&version), "asking for the runtime's version");
    return version;
}

}  // namespace cuda
}  // namespace sk
