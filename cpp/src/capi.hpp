// The frame of every C function: no exception leaves it, and every failure is a status.
#pragma once

#include <exception>
#include <new>
#include <string>

#include "cost.hpp"
#include "error.hpp"

struct l2a_status {
    l2a_code code;
    std::string message;
};

namespace l2a::core {

// NULL where there is not even memory for a status would mean success: this one is always there.
l2a_status* status_without_memory() noexcept;

inline l2a_status* status(l2a_code code, const char* message) noexcept {
    try {
        return new l2a_status{code, message};
    } catch (...) {
        return status_without_memory();
    }
}

template <typename Action>
l2a_status* guarded(Action&& action) noexcept {
    try {
        action();
        return nullptr;
    } catch (const Error& error) {
        return status(error.code(), error.what());
    } catch (const std::bad_alloc&) {
        return status(L2A_ERROR_OUT_OF_MEMORY, "there is not enough memory");
    } catch (const std::exception& error) {
        return status(L2A_ERROR_INTERNAL, error.what());
    } catch (...) {
        return status(L2A_ERROR_INTERNAL, "an unknown exception");
    }
}

// A budget as callers see it.
inline l2a_budget shown(const Budget& budget) noexcept {
    return {budget.compute, budget.layers.value_or(-1), budget.heads.value_or(-1), budget.think_tokens.value_or(-1)};
}

// Throws a config error for a NULL that must not be one.
template <typename T>
T& given(T* pointer, const char* name) {
    if (pointer == nullptr) config_error(std::string(name) + " must not be NULL");
    return *pointer;
}

// Makes a caller's structure of `size` bytes, which may be older and so shorter, or newer and longer, what `value` is.
template <typename T>
void init_struct(void* to, std::size_t size, T value) noexcept {
    if (to == nullptr || size < sizeof(std::uint32_t)) return;
    value.struct_size = static_cast<std::uint32_t>(size);
    __builtin_memset(to, 0, size);
    __builtin_memcpy(to, &value, size < sizeof(T) ? size : sizeof(T));
}

// Copies between a caller's structure, which may be older and so shorter, or newer and longer, and ours.
template <typename T>
void read_struct(const T* from, T& to) {
    if (from == nullptr) return;
    const std::size_t size = from->struct_size < sizeof(T) ? from->struct_size : sizeof(T);
    if (size < sizeof(std::uint32_t)) config_error("struct_size is not set; call the _init function");
    __builtin_memcpy(&to, from, size);
}

template <typename T>
void write_struct(const T& from, T* to) {
    const std::uint32_t size = given(to, "the structure").struct_size;
    if (size < sizeof(std::uint32_t)) config_error("struct_size is not set; set it to the structure's size");
    __builtin_memcpy(to, &from, size < sizeof(T) ? size : sizeof(T));
    // What a newer caller knows besides is 0, and not what stood there.
    if (size > sizeof(T)) __builtin_memset(reinterpret_cast<char*>(to) + sizeof(T), 0, size - sizeof(T));
    to->struct_size = size;
}

}  // namespace l2a::core
