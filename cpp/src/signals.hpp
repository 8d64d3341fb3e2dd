// What the machine has left: the readings of docs/signals.md, one small class per source. Reading never throws: what
// cannot be read has no value and says why.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace l2a::core {

struct Reading {
    const char* name;  // constants, as is the unit
    const char* unit;
    double value;  // NaN where it is not available
    std::string why;
};

class Source {
  public:
    // Of the one reading `only`, where it is given.
    explicit Source(std::string only = "") : only_(std::move(only)) {}
    virtual ~Source() = default;
    // Appends all readings of the source, always the same ones.
    virtual void read(std::vector<Reading>& into) = 0;

  protected:
    // Appends what `value` returns, or the text of the exception that it throws.
    void add(std::vector<Reading>& into, const char* name, const char* unit,
             const std::function<double()>& value) const;

  private:
    std::string only_;
};

// Memory and load of the whole host, from `root`/proc.
std::unique_ptr<Source> host_source(const std::string& root, const std::string& only = "");
// Shares of about the last second in which tasks waited, from `root`/proc/pressure. `clock` is in seconds; steady by
// default.
std::unique_ptr<Source> pressure_source(const std::string& root, std::function<double()> clock = {});
// The control group, version 1 or 2, of this process; the tightest of nested groups.
std::unique_ptr<Source> cgroup_source(const std::string& root, const std::string& only = "");
// An NVIDIA device by index or UUID, through NVML where its library is installed.
std::unique_ptr<Source> gpu_source(const std::string& device);

// Bytes that this process may still take, of host and control group the lower; NaN where neither is known. Each call
// reads them.
std::function<double()> memory_source(const std::string& root);

// Of a clock that only goes forward.
double steady_seconds();
// Lines of a small text file. Throws std::runtime_error.
std::vector<std::string> lines_of(const std::string& path);
// The number that a text begins with, whatever the locale. Throws std::runtime_error.
double number_at(std::string_view text);
bool is_file(const std::string& path);

}  // namespace l2a::core
