// From files to devices: a thread reads into pinned buffers, and copies from these go on while it fills the next.
//
//     next()    a buffer that no copy reads any more
//               the caller fills it
//     add()     what of it belongs where
//     send()    the copies, on a stream of ours for each device, and an event behind them
//
// The driver is asked (cuEventQuery), not waited for, so that a device that hangs leaves threads that can be told so.
#pragma once

#include <array>
#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/device.h"
#include "cuda/driver.h"

namespace lazyckpt {

// What the threads of one reading share: a stream for each device.
class Uplinks {
 public:
  struct Link {
    std::shared_ptr<const cuda::Context> context;
    std::unique_ptr<cuda::Stream> stream;
  };

  // `driver`: the path of libcuda; empty: the system's. `streams`: for each device the one on which the caller computes: what it
  // has been given so far comes before all copies. Throws Error(kDevice), also if one of them is being captured into a graph.
  Uplinks(const std::string& driver, const std::vector<int>& devices, const Streams& streams);

  Link& at(int device) { return *links_.at(device); }
  Link& any() { return *links_.begin()->second; }

 private:
  std::map<int, std::unique_ptr<Link>> links_;
};

// The buffers of one thread.
class UploadRing {
 public:
  UploadRing(std::shared_ptr<Uplinks> links, size_t buffer_bytes, size_t align);
  // Copies read the buffers and write to their destinations until they have ended, so this waits for them, however long.
  ~UploadRing();
  UploadRing(const UploadRing&) = delete;
  UploadRing& operator=(const UploadRing&) = delete;

  // These three throw what copies have failed with.
  std::byte* next();
  void send();
  void finish();  // waits for all

  void add(int device, std::byte* to, const std::byte* from, size_t bytes);

 private:
  struct Flight {
    std::unique_ptr<cuda::Event> event;
    bool flying = false;
    bool marked = false;  // the event stands behind the copies; else the stream is looked at
  };
  struct Buffer {
    std::unique_ptr<cuda::HostMemory> memory;
    std::byte* begin = nullptr;
    std::map<int, Flight> flights;  // by device
  };

  void make(Buffer& buffer);
  void launch(Buffer& buffer, int device, const std::vector<cuda::Copy>& copies);
  bool is_over(int device, Flight& flight);
  void land(Buffer& buffer);

  const std::shared_ptr<Uplinks> links_;
  const size_t buffer_bytes_, align_;
  std::map<int, std::vector<cuda::Copy>> gathered_;  // by device
  size_t turn_ = 0;
  std::array<Buffer, 2> buffers_;
};

}  // namespace lazyckpt
