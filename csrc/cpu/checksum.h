// A checksum of int32 entries, at the speed at which memory is read.
#pragma once

#include <cstdint>

namespace sk {

// The same on every processor. Any change of up to three entries changes the sums below; a change
// of more goes unseen with a probability of about 2^-64.
uint64_t checksum(const uint32_t* entries, int64_t count);

}  // namespace sk
