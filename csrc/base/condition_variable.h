// std::condition_variable, in a way that wheels run on machines with an older libstdc++.
#pragma once

#include <condition_variable>

// GCC 12 has given wait() a new version, and nothing else here needs so new a library. The one before does the same; it is what
// all compilers before it link with. (By the new one, a thread may be cancelled while it waits: nobody cancels ours.)
#if defined(__x86_64__) && defined(_GLIBCXX_RELEASE) && _GLIBCXX_RELEASE >= 12
__asm__(
    ".symver _ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE,"
    "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE@GLIBCXX_3.4.11");
#endif
