// Turns a failed check into a status and one sentence.
#include <stdarg.h>
#include <stdio.h>

#include "rbe.h"

rbe_status rbe_fail(rbe_error *err, rbe_status status, const char *format, ...) {
    if (err) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(err->text, sizeof err->text, format, arguments);  // a longer sentence is cut, never written past the end
        va_end(arguments);
    }
    return status;
}
