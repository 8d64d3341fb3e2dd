// Every failure inside the library is an Error; the C ABI turns it into a status. Codes are those of l2a.h.
#pragma once

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>

#include "l2a/l2a.h"

namespace l2a::core {

class Error : public std::runtime_error {
  public:
    Error(l2a_code code, const std::string& message) : std::runtime_error(message), code_(code) {}
    [[nodiscard]] l2a_code code() const noexcept { return code_; }

  private:
    l2a_code code_;
};

[[noreturn]] inline void bundle_error(const std::string& message) {
    throw Error(L2A_ERROR_BUNDLE, message);
}
[[noreturn]] inline void budget_error(const std::string& message) {
    throw Error(L2A_ERROR_BUDGET, message);
}
[[noreturn]] inline void config_error(const std::string& message) {
    throw Error(L2A_ERROR_CONFIG, message);
}

}  // namespace l2a::core
