#!/bin/sh
set -e
cd "$(dirname "$0")"
gcc -c -m64 stub.S -o stub.o
gcc -c -m64 -O2 -ffreestanding -fno-pic -mno-red-zone -mgeneral-regs-only -fno-stack-protector -fcf-protection=none -fno-asynchronous-unwind-tables -mcmodel=small main.c -o main.o
ld -nostdlib -static -z max-page-size=4096 --build-id=none -z noexecstack -T link.ld stub.o main.o -o payload.elf
rm -f stub.o main.o
