// A checksum of int32 entries, at the speed at which memory is read.
#pragma once

#include <cstdint>

namespace sk {

// The same on every processor. A change of one entry is always seen. It is no cryptographic hash: a
// change that was constructed for it may go unseen.
uint64_t checksum(const uint32_t* entries, int64_t count);

}  // namespace sk
