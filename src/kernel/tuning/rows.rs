//! Rows of the default table for exact shapes, which come from measurements on adapters.

use super::Sizes;
use super::measured::ROWS;
use crate::format::KvFormat;
use crate::kernel::target::{Profile, Vendor};
use crate::kernel::variant::{Kernel, Variant};

/// Adapters that share a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Adapters that run shaders on CPU cores.
    Cpu,
    /// GPUs of a vendor.
    Gpu(Vendor),
}

/// Sizes for one shape on one class of adapters.
#[derive(Debug)]
#[allow(dead_code, reason = "without files that call for one there are none")]
pub(super) struct Row {
    pub(super) class: Class,
    pub(super) kernel: Kernel,
    pub(super) head_dim: u32,
    pub(super) group_size: u32,
    /// K and V.
    pub(super) formats: [KvFormat; 2],
    pub(super) sizes: Sizes,
}

impl Row {
    fn is_for(&self, variant: &Variant) -> bool {
        let class = match variant.target.profile {
            Profile::Cpu => Class::Cpu,
            Profile::Gpu => Class::Gpu(variant.target.vendor),
        };
        self.class == class
            && self.kernel == variant.kernel
            && (self.head_dim, self.head_dim, self.group_size)
                == (variant.head_dim, variant.value_dim, variant.group_size)
            && self.formats == [variant.k_format, variant.v_format]
    }
}

/// The sizes of the row for a variant that has those of the general rules, if there is one and the target can run it: adapters of a class differ in
/// subgroups, 64-bit integers and matrix units.
pub(super) fn find(variant: &Variant) -> Option<Sizes> {
    find_in(ROWS, variant)
}

fn find_in(rows: &[Row], variant: &Variant) -> Option<Sizes> {
    // No list of candidates is made where no row is in question.
    let mut rows = rows.iter().filter(|row| row.is_for(variant)).peekable();
    rows.peek()?;
    let candidates = variant.candidates();
    rows.map(|row| row.sizes).find(|sizes| candidates.contains(sizes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{AttendFlags, Target};
    use crate::layout::KvCacheConfig;

    fn variant(profile: Profile, vendor: Vendor, subgroup_size: u32) -> Variant {
        let target = Target {
            profile,
            vendor,
            subgroups: true,
            subgroup_size,
            int64: true,
            matrix: None,
            packed_dots: false,
            enable_directives: false,
        };
        let config = KvCacheConfig::new(1, 2, 64).with_formats(KvFormat::F16, KvFormat::Int8);
        Variant::new(Kernel::Decode, target, &config, 4, AttendFlags::default())
    }

    fn row(class: Class, sizes: Sizes) -> Row {
        let formats = [KvFormat::F16, KvFormat::Int8];
        Row { class, kernel: Kernel::Decode, head_dim: 64, group_size: 4, formats, sizes }
    }

    #[test]
    fn a_row_is_for_its_class_and_shape() {
        let amd = variant(Profile::Gpu, Vendor::Amd, 0);
        let sizes = amd.candidates()[1];
        let rows = [row(Class::Gpu(Vendor::Amd), sizes)];
        assert_eq!(find_in(&rows, &amd), Some(sizes));
        assert_eq!(find_in(&rows, &variant(Profile::Gpu, Vendor::Other, 0)), None);
        assert_eq!(find_in(&rows, &variant(Profile::Cpu, Vendor::Amd, 8)), None);
        for other in [
            Variant { head_dim: 72, ..amd },
            Variant { value_dim: 72, ..amd },
            Variant { group_size: 2, ..amd },
            Variant { kernel: Kernel::Prefill, ..amd },
            Variant { k_format: KvFormat::F32, ..amd },
            Variant { v_format: KvFormat::F16, ..amd },
        ] {
            assert_eq!(find_in(&rows, &other), None, "{other:?}");
        }
    }

    /// Lanes of another adapter, or loads that it hasn't got: the next row that fits, or none.
    #[test]
    fn a_row_that_the_target_cannot_run_is_passed_over() {
        let wide = variant(Profile::Cpu, Vendor::Other, 8);
        let narrow = variant(Profile::Cpu, Vendor::Other, 4);
        let [for_wide, for_narrow] = [&wide, &narrow].map(|v| *v.candidates().last().expect("itself"));
        let rows = [row(Class::Cpu, for_wide), row(Class::Cpu, for_narrow)];
        assert_eq!(find_in(&rows, &wide), Some(for_wide));
        assert_eq!(find_in(&rows, &narrow), Some(for_narrow));
        assert_eq!(find_in(&rows[..1], &narrow), None);
        let loads = wide.candidates().into_iter().find(|sizes| sizes.int64).expect("the widest loads");
        let mut without = wide;
        without.target.int64 = false;
        assert_eq!(find_in(&[row(Class::Cpu, loads)], &without), None);
    }
}
