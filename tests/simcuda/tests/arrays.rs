//! Arrays, copies with them, textures and surfaces.

mod common;

use common::*;

/// `CUDA_ARRAY3D_DESCRIPTOR`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape(usize, usize, usize, u32, u32, u32);

/// `CUDA_RESOURCE_DESC`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Resource(u32, [u64; 16], u32);

/// An end of `CUDA_MEMCPY2D`.
#[repr(C)]
struct Corner(usize, usize, u32, u64, u64, usize, usize);

/// `CUDA_MEMCPY2D`.
#[repr(C)]
struct Plane(Corner, Corner, usize, usize);

const BYTE: u32 = 1;
const FLOAT: u32 = 0x20;
const SURFACE: u32 = 2;

fn create(cuda: &Cuda, shape: Shape) -> Result<usize, i32> {
    let mut array = 0usize;
    match call!(cuda, "cuArray3DCreate_v2", &mut array => &mut usize, &shape => &Shape) {
        0 => Ok(array),
        error => Err(error),
    }
}

fn destroy(cuda: &Cuda, array: usize) -> i32 {
    call!(cuda, "cuArrayDestroy", array => usize)
}

#[test]
fn an_array_takes_room_and_keeps_what_is_copied_to_it() {
    alone("an_array_takes_room_and_keeps_what_is_copied_to_it", &[], || {
        let cuda = Cuda::with_context();
        let before = cuda.free_bytes();
        // 1024 rows of 1024 pairs of floats.
        let shape = Shape(1024, 1024, 0, FLOAT, 2, SURFACE);
        let array = create(&cuda, shape).unwrap();
        assert_eq!(cuda.free_bytes(), before - 8 * MIB);
        let mut has = Shape(0, 0, 0, 0, 0, 0);
        assert_eq!(call!(cuda, "cuArray3DGetDescriptor_v2", &mut has => &mut Shape, array => usize), 0);
        assert_eq!(has, shape);
        let device = cuda.alloc(PAGE);
        cuda.write(device, &[10, 11, 12, 13, 14, 15]);
        // Two rows of three pairs, from memory with rows of 24 bytes to row 1, column 2.
        let into = |x: usize, y: usize| {
            let copy = Plane(Corner(0, 0, 2, 0, device, 0, 24), Corner(x, y, 3, 0, 0, array, 0), 24, 2);
            call!(cuda, "cuMemcpy2D_v2", &copy => &Plane)
        };
        assert_eq!(into(16, 1), 0);
        assert_eq!(into(8192 - 16, 1), 1, "beyond the row");
        assert_eq!(into(0, 1023), 1, "beyond the last row");
        let words = |offset: usize| {
            let mut data = [0u64; 4];
            let code = call!(
                cuda, "cuMemcpyAtoH_v2",
                &mut data => &mut [u64; 4], array => usize, offset => usize, 32 => usize,
            );
            assert_eq!(code, 0);
            data
        };
        assert_eq!(words(8192 + 16), [10, 11, 12, 0]);
        assert_eq!(words(2 * 8192 + 8), [0, 13, 14, 15]);

        let other = create(&cuda, Shape(4096, 0, 0, BYTE, 1, 0)).unwrap();
        let code = call!(
            cuda, "cuMemcpyAtoA_v2",
            other => usize, 8 => usize, array => usize, 8192 + 16 => usize, 24 => usize,
        );
        assert_eq!(code, 0);
        let back = call!(cuda, "cuMemcpyAtoD_v2", device => u64, other => usize, 0 => usize, 32 => usize);
        assert_eq!((back, cuda.read(device, 4)), (0, vec![0, 10, 11, 12]));
        let beyond = call!(cuda, "cuMemcpyAtoD_v2", device => u64, other => usize, 4090 => usize, 8 => usize);
        assert_eq!(beyond, 1);
        let data = [7u64; 2];
        let stream = cuda.stream(1);
        let code = call!(
            cuda, "cuMemcpyHtoAAsync_v2",
            other => usize, 0 => usize, &data => &[u64; 2], 16 => usize, stream => usize,
        );
        assert_eq!((code, cuda.sync(stream)), (0, 0));
        let back = call!(cuda, "cuMemcpyAtoD_v2", device => u64, other => usize, 0 => usize, 24 => usize);
        assert_eq!((back, cuda.read(device, 3)), (0, vec![7, 7, 11]));

        cuda.free(device);
        assert_eq!([destroy(&cuda, array), destroy(&cuda, other)], [0, 0]);
        assert_eq!(destroy(&cuda, array), 400);
        assert_eq!(cuda.free_bytes(), before);
    });
}

#[test]
fn shapes_that_make_no_sense_are_refused() {
    alone("shapes_that_make_no_sense_are_refused", &[("NVSHARE_SIM_MEMORY", "32MiB")], || {
        let cuda = Cuda::with_context();
        let before = cuda.free_bytes();
        assert_eq!(create(&cuda, Shape(0, 0, 0, FLOAT, 1, 0)), Err(1), "nothing");
        assert_eq!(create(&cuda, Shape(8, 0, 0, FLOAT, 3, 0)), Err(1), "three channels");
        assert_eq!(create(&cuda, Shape(8, 0, 0, 0x77, 1, 0)), Err(1), "no format");
        assert_eq!(create(&cuda, Shape(8, 8, 0, 0x91, 1, 0)), Err(801), "compressed");
        assert_eq!(create(&cuda, Shape(8, 8, 0, FLOAT, 1, 0x40)), Err(801), "sparse");
        assert_eq!(create(&cuda, Shape(8, 8, 5, FLOAT, 1, 4)), Err(1), "a cube of five sides");
        assert!(create(&cuda, Shape(8, 8, 6, FLOAT, 1, 4)).is_ok());
        assert_eq!(create(&cuda, Shape(4096, 4096, 0, FLOAT, 1, 0)), Err(OUT_OF_MEMORY));
        assert_eq!(cuda.free_bytes(), before - (64 << 10));
        assert_eq!(cuda.counters().out_of_memory, 1);
    });
}

#[test]
fn a_mipmapped_array_has_levels() {
    alone("a_mipmapped_array_has_levels", &[], || {
        let cuda = Cuda::with_context();
        let before = cuda.free_bytes();
        let (mut mipmap, shape) = (0usize, Shape(1024, 256, 0, FLOAT, 1, 0));
        let code = call!(
            cuda, "cuMipmappedArrayCreate", &mut mipmap => &mut usize, &shape => &Shape, 3 => u32,
        );
        assert_eq!(code, 0);
        assert_eq!(cuda.free_bytes(), before - (1024 + 256 + 64) * 1024);
        let level = |level: u32| {
            let mut array = 0usize;
            let code = call!(
                cuda, "cuMipmappedArrayGetLevel", &mut array => &mut usize, mipmap => usize, level => u32,
            );
            if code == 0 { Ok(array) } else { Err(code) }
        };
        assert_eq!(level(3), Err(1));
        let mut has = Shape(0, 0, 0, 0, 0, 0);
        let last = level(2).unwrap();
        assert_eq!(call!(cuda, "cuArray3DGetDescriptor_v2", &mut has => &mut Shape, last => usize), 0);
        assert_eq!(has, Shape(256, 64, 0, FLOAT, 1, 0));
        assert_eq!(destroy(&cuda, last), 400, "it belongs to the whole");
        assert_eq!(call!(cuda, "cuMipmappedArrayDestroy", mipmap => usize), 0);
        assert_eq!(cuda.free_bytes(), before);
        assert_eq!(call!(cuda, "cuArray3DGetDescriptor_v2", &mut has => &mut Shape, last => usize), 400);
    });
}

#[test]
fn textures_and_surfaces_remember_what_they_were_made_of() {
    alone("textures_and_surfaces_remember_what_they_were_made_of", &[], || {
        let cuda = Cuda::with_context();
        let plain = create(&cuda, Shape(64, 64, 0, FLOAT, 1, 0)).unwrap();
        let writable = create(&cuda, Shape(64, 64, 0, FLOAT, 1, SURFACE)).unwrap();
        let of = |array: usize| {
            let mut words = [0; 16];
            words[0] = array as u64;
            Resource(0, words, 0)
        };
        let texture = |resource: Resource| {
            let (mut object, description) = (0u64, [0u32; 26]);
            let code = call!(
                cuda, "cuTexObjectCreate",
                &mut object => &mut u64, &resource => &Resource, &description => &[u32; 26], 0 => usize,
            );
            if code == 0 { Ok(object) } else { Err(code) }
        };
        let surface = |resource: Resource| {
            let mut object = 0u64;
            let code = call!(cuda, "cuSurfObjectCreate", &mut object => &mut u64, &resource => &Resource);
            if code == 0 { Ok(object) } else { Err(code) }
        };
        let made = texture(of(plain)).unwrap();
        let mut resource = of(0);
        let code = call!(
            cuda, "cuTexObjectGetResourceDesc", &mut resource => &mut Resource, made => u64,
        );
        assert_eq!((code, resource), (0, of(plain)));
        assert_eq!(texture(of(77)), Err(400));
        let mut linear = of(cuda.alloc(PAGE) as usize);
        linear.0 = 2;
        linear.1[1] = u64::from(FLOAT) | 4 << 32;
        assert!(texture(linear).is_ok());
        linear.1[0] = 4096;
        assert_eq!(texture(linear), Err(1), "nothing is there");
        assert_eq!(surface(of(plain)), Err(1), "not made for that");
        let written = surface(of(writable)).unwrap();
        assert_eq!(call!(cuda, "cuTexObjectDestroy", written => u64), 1, "a surface");
        assert_eq!(call!(cuda, "cuSurfObjectDestroy", written => u64), 0);
        assert_eq!(call!(cuda, "cuTexObjectDestroy", made => u64), 0);
        assert_eq!(call!(cuda, "cuTexObjectDestroy", made => u64), 1);
    });
}

#[test]
fn an_array_goes_with_its_context() {
    alone("an_array_goes_with_its_context", &[], || {
        let cuda = Cuda::with_context();
        let before = cuda.free_bytes();
        let array = create(&cuda, Shape(1024, 1024, 0, FLOAT, 1, 0)).unwrap();
        assert_eq!(call!(cuda, "cuDevicePrimaryCtxReset_v2", 0 => i32), 0);
        let cuda = Cuda::with_context();
        assert_eq!(cuda.free_bytes(), before);
        assert_eq!(destroy(&cuda, array), 400);
    });
}
