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

// Memory of a large result, in huge pages, because small ones fault one by one. It is taken from
// malloc as it is and aligned inside: an aligned allocation of glibc before 2.38 does not fit the
// gap that one of the same size has left. Throws std::bad_alloc.
class Memory {
public:
    explicit Memory(size_t bytes);
    Memory(const Memory&) = delete;
    ~Memory();
    uint8_t* data() const { return data_; }
    size_t size() const { return size_; }

private:
    void* allocated_;
    uint8_t* data_;
    size_t size_;
};

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
