// NVML by its stable C interface, declared here since its header is not everywhere. Source:
// https://docs.nvidia.com/deploy/nvml-api/
#include <dlfcn.h>

#include <algorithm>
#include <cctype>
#include <stdexcept>

#include "signals.hpp"

namespace l2a::core {
namespace {

using Device = void*;
struct Memory {
    unsigned long long total, free, used;
};
struct Utilization {
    unsigned int gpu, memory;
};

// Clocks that are low because there is nothing to do, because somebody set them, or because a GPU that is busy keeps to
// its power limit, as it did when costs were measured, are no throttling: it is a slowdown by hardware, of heat (by
// software or hardware), or by a power brake.
constexpr unsigned long long kThrottled = 0x8 | 0x20 | 0x40 | 0x80;

class Gpu : public Source {
  public:
    explicit Gpu(std::string device) : device_(std::move(device)) {}
    ~Gpu() override {
        if (library_ != nullptr) dlclose(library_);
    }
    Gpu(const Gpu&) = delete;
    Gpu& operator=(const Gpu&) = delete;

    void read(std::vector<Reading>& into) override {
        add(into, "gpu.memory_free", "bytes", [&] { return static_cast<double>(memory().free); });
        add(into, "gpu.memory_total", "bytes", [&] { return static_cast<double>(memory().total); });
        add(into, "gpu.utilization", "share", [&] {
            Utilization found{};
            call<Device, Utilization*>("nvmlDeviceGetUtilizationRates", handle(), &found);
            return found.gpu / 100.0;
        });
        add(into, "gpu.throttled", "share", [&] {
            unsigned long long reasons = 0;
            call<Device, unsigned long long*>("nvmlDeviceGetCurrentClocksThrottleReasons", handle(), &reasons);
            return (reasons & kThrottled) != 0 ? 1.0 : 0.0;
        });
    }

  private:
    std::string device_;
    void* library_ = nullptr;
    Device handle_ = nullptr;

    template <typename... Arguments>
    void call(const char* name, Arguments... arguments) const {
        const auto function = reinterpret_cast<int (*)(Arguments...)>(dlsym(library_, name));
        if (function == nullptr) throw std::runtime_error(std::string("NVML has no ") + name);
        const int code = function(arguments...);
        if (code != 0) throw std::runtime_error(std::string(name) + ": NVML error " + std::to_string(code));
    }

    Memory memory() {
        Memory found{};
        call<Device, Memory*>("nvmlDeviceGetMemoryInfo", handle(), &found);
        return found;
    }

    // Started at the first reading and never shut down: other users of the process may need it.
    Device handle() {
        if (handle_ != nullptr) return handle_;
        if (library_ == nullptr) library_ = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library_ == nullptr) throw std::runtime_error("NVML is not installed: no libnvidia-ml.so.1");
        call<>("nvmlInit_v2");
        Device found = nullptr;
        const bool index = !device_.empty() && std::all_of(device_.begin(), device_.end(), [](unsigned char digit) {
            return std::isdigit(digit) != 0;
        });
        if (index) {
            call<unsigned int, Device*>("nvmlDeviceGetHandleByIndex_v2", static_cast<unsigned int>(std::stoul(device_)),
                                        &found);
        } else {
            call<const char*, Device*>("nvmlDeviceGetHandleByUUID", device_.c_str(), &found);
        }
        return handle_ = found;
    }
};

}  // namespace

std::unique_ptr<Source> gpu_source(const std::string& device) {
    return std::make_unique<Gpu>(device);
}

}  // namespace l2a::core
