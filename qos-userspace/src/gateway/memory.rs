//! Arrays that userspace and the kernel programs both see: memory-mapped BPF maps.
//!
//! Every access is volatile, element by element; what must be seen at once is one aligned word.

use std::marker::PhantomData;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use aya::Pod;
use memmap2::{MmapOptions, MmapRaw};

/// An array of `T`, shared with the kernel.
#[derive(Debug)]
pub struct SharedArray<T> {
    memory: RawArray,
    element: PhantomData<T>,
}

impl<T: Pod> SharedArray<T> {
    /// Maps the memory of an array map of `length` elements made with `BPF_F_MMAPABLE`.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn of_map(fd: BorrowedFd<'_>, length: u32) -> std::io::Result<Self> {
        Ok(Self { memory: RawArray::of_map(fd, size_of::<T>() as u32, length)?, element: PhantomData })
    }

    /// Memory of the same shape that no kernel sees, all zero.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn private(length: u32) -> std::io::Result<Self> {
        let stride = stride(size_of::<T>());
        let memory = MmapOptions::new().len(length as usize * stride).map_anon()?.into();
        Ok(Self { memory: RawArray { memory, stride, length }, element: PhantomData })
    }

    /// Number of elements.
    #[must_use]
    pub const fn length(&self) -> u32 {
        self.memory.length()
    }

    /// Memory of all elements, in bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.memory.length as u64 * self.memory.stride as u64
    }

    /// Copy of the element `index`.
    ///
    /// # Panics
    /// Where there is no such element.
    #[must_use]
    pub fn read(&self, index: u32) -> T {
        // SAFETY: `at` checked the index; T is plain data, valid for any bytes.
        unsafe { self.at(index).read_volatile() }
    }

    /// Writes the element `index`. Everything written before is seen before it.
    ///
    /// # Panics
    /// Where there is no such element.
    pub fn write(&self, index: u32, value: T) {
        fence(Ordering::Release);
        // SAFETY: `at` checked the index, and the mapping is writable.
        unsafe { self.at(index).write_volatile(value) };
        fence(Ordering::Release);
    }

    /// Writes the element `index` where it is another. Tells whether it was.
    ///
    /// # Panics
    /// Where there is no such element.
    pub fn put(&self, index: u32, value: T) -> bool
    where
        T: PartialEq,
    {
        let differs = self.read(index) != value;
        if differs {
            self.write(index, value);
        }
        differs
    }

    /// Writes what differs in the element `index`, one 64-bit word after the other, each at once. An element
    /// is a whole number of them.
    ///
    /// # Panics
    /// Where there is no such element.
    pub fn update(&self, index: u32, value: &T) {
        const { assert!(size_of::<T>().is_multiple_of(8) && align_of::<T>() == 8) };
        let wanted = core::ptr::from_ref(value).cast::<u64>();
        for number in 0..size_of::<T>() / 8 {
            // SAFETY: the value is that many aligned words without padding: it is plain data.
            let wanted = unsafe { wanted.add(number).read() };
            let word = self.memory.word(index, number * 8);
            if word.load(Ordering::Relaxed) != wanted {
                word.store(wanted, Ordering::Release);
            }
        }
    }

    /// The 64-bit word at a place of the element `index`, which others change too.
    ///
    /// # Panics
    /// Where there is no such element, or no word at that place.
    #[must_use]
    pub fn word(&self, index: u32, offset: usize) -> &AtomicU64 {
        self.memory.word(index, offset)
    }

    /// Every element is aligned to 8 bytes.
    fn at(&self, index: u32) -> *mut T {
        self.memory.at(index, 0, size_of::<T>()).cast()
    }
}

/// Bytes from one value to the next: the kernel rounds them up to 8, as it lays array maps out.
const fn stride(size: usize) -> usize {
    size.next_multiple_of(8)
}

/// An array map of values that are known by the places of their fields alone.
#[derive(Debug)]
pub struct RawArray {
    memory: MmapRaw,
    stride: usize,
    length: u32,
}

impl RawArray {
    /// Maps the memory of an array map of `length` values of `size` bytes, made with `BPF_F_MMAPABLE`.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn of_map(fd: BorrowedFd<'_>, size: u32, length: u32) -> std::io::Result<Self> {
        let stride = stride(size as usize);
        let memory = MmapOptions::new().len(length as usize * stride).map_raw(fd.as_raw_fd())?;
        Ok(Self { memory, stride, length })
    }

    /// Number of values.
    #[must_use]
    pub const fn length(&self) -> u32 {
        self.length
    }

    /// The word at a place of a value, which others change too.
    ///
    /// # Panics
    /// Where the value has no such place, or no word can be there.
    #[must_use]
    pub fn word(&self, index: u32, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8), "a word at {offset}");
        // SAFETY: `at` checked the place, the mapping is page-aligned and the stride a multiple of 8, and
        // it lives as long as `self`.
        unsafe { AtomicU64::from_ptr(self.at(index, offset, 8).cast()) }
    }

    /// Copy of the bytes at a place of a value.
    ///
    /// # Panics
    /// Where the value has no such place.
    #[must_use]
    pub fn read(&self, index: u32, offset: usize, length: usize) -> Vec<u8> {
        let start = self.at(index, offset, length);
        // SAFETY: `at` checked all of them.
        (0..length).map(|byte| unsafe { start.add(byte).read_volatile() }).collect()
    }

    /// Writes bytes to a place of a value.
    ///
    /// # Panics
    /// Where the value has no such place.
    pub fn write(&self, index: u32, offset: usize, bytes: &[u8]) {
        let start = self.at(index, offset, bytes.len());
        for (number, byte) in bytes.iter().enumerate() {
            // SAFETY: `at` checked all of them, and the mapping is writable.
            unsafe { start.add(number).write_volatile(*byte) };
        }
    }

    fn at(&self, index: u32, offset: usize, length: usize) -> *mut u8 {
        assert!(index < self.length, "value {index} of {}", self.length);
        assert!(offset + length <= self.stride, "bytes {offset} to {} of {}", offset + length, self.stride);
        // SAFETY: the place is within the mapping.
        unsafe { self.memory.as_mut_ptr().add(index as usize * self.stride + offset) }
    }
}

/// Waits until every kernel program that runs now has ended, so that nothing any longer reads what
/// was replaced before the call.
///
/// membarrier(2)'s global command waits for an RCU grace period (linux/kernel/sched/membarrier.c,
/// 6.1), and BPF programs run inside RCU read-side critical sections.
///
/// # Errors
/// Where the kernel was built without membarrier.
pub fn grace_period() -> std::io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_long = 1;
    // SAFETY: a system call that takes two numbers and touches no memory of ours.
    let answer = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0) };
    if answer < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}
