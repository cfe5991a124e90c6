// Working memory that a thread keeps between calls, up to a limit: fresh pages cost more than the
// kernels that use them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sk {

// At least `bytes` bytes, aligned to 64, valid until this thread's next call. Throws
// std::bad_alloc.
void* scratch(size_t bytes);
// Gives back what is more than a thread may keep.
void trim_scratch();

// Fresh memory of many pages is slow to touch for the first time: asks for large ones.
void use_huge_pages(void* data, size_t bytes);

// Hands out aligned pieces of one scratch buffer.
class Arena {
public:
    Arena() = default;
    Arena(const Arena&) = delete;
    ~Arena() { trim_scratch(); }
    template <class T>
    size_t reserve(int64_t count) {
        const size_t at = size_;
        size_ += (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
        return at;
    }
    void allocate() { base_ = static_cast<char*>(scratch(size_)); }
    template <class T>
    T* at(size_t offset) const {
        return reinterpret_cast<T*>(base_ + offset);
    }

private:
    size_t size_ = 0;
    char* base_ = nullptr;
};

}  // namespace sk
