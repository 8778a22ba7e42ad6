//! The order of listings, which is not quite an order.
//!
//! Marks and addresses are compared by their difference, modulo 2^32 and read as a signed number: 200.0.0.1 comes before
//! 1.0.0.1. Addresses more than 2^31 apart can form circles that way, and then the result depends on the steps of the
//! sort. So the sort is written out here: a merge sort from the top down, the first half the smaller one, as in the C
//! library's `qsort` that the original used.

use std::{cmp::Ordering, net::IpAddr};

use crate::director::model::{Family, ServerView, ServiceId, ServiceView};

/// Services in the order of a listing.
pub(super) fn services(services: &[ServiceView]) -> Vec<&ServiceView> {
    merge_sort(&services.iter().collect::<Vec<_>>(), &|left, right| compare_services(&left.id, &right.id))
}

/// Real servers in the order of a listing.
pub(super) fn servers(servers: &[ServerView]) -> Vec<&ServerView> {
    merge_sort(&servers.iter().collect::<Vec<_>>(), &|left, right| {
        compare_addresses(left.id.address, right.id.address).then(left.id.port.cmp(&right.id.port))
    })
}

fn merge_sort<T: Copy>(items: &[T], compare: &impl Fn(T, T) -> Ordering) -> Vec<T> {
    if items.len() < 2 {
        return items.to_vec();
    }
    let (left, right) = items.split_at(items.len() / 2);
    let (left, right) = (merge_sort(left, compare), merge_sort(right, compare));
    let (mut left, mut right) = (left.as_slice(), right.as_slice());
    let mut merged = Vec::with_capacity(items.len());
    while let ([first_left, rest_left @ ..], [first_right, rest_right @ ..]) = (left, right) {
        if compare(*first_left, *first_right).is_gt() {
            merged.push(*first_right);
            right = rest_right;
        } else {
            merged.push(*first_left);
            left = rest_left;
        }
    }
    merged.extend_from_slice(left);
    merged.extend_from_slice(right);
    merged
}

/// By mark (none counts as 0), family, protocol, address and port.
fn compare_services(left: &ServiceId, right: &ServiceId) -> Ordering {
    let parts = |service: &ServiceId| match *service {
        ServiceId::Address { protocol, address, port } => (0, Family::of(address), protocol.number(), address, port),
        ServiceId::Mark { mark, family } => (mark, family, 0, family.unspecified(), 0),
    };
    let (left, right) = (parts(left), parts(right));
    wrapping(left.0, right.0)
        .then(left.1.cmp(&right.1))
        .then(left.2.cmp(&right.2))
        .then_with(|| compare_addresses(left.3, right.3))
        .then(left.4.cmp(&right.4))
}

/// Word by word; of different families, an IPv4 address is one word, or four with zeros if it is the second.
fn compare_addresses(left: IpAddr, right: IpAddr) -> Ordering {
    let words = |address: IpAddr| match address {
        IpAddr::V4(address) => [u32::from(address), 0, 0, 0],
        IpAddr::V6(address) => {
            let bits = u128::from(address);
            [(bits >> 96) as u32, (bits >> 64) as u32, (bits >> 32) as u32, bits as u32]
        }
    };
    let length = if left.is_ipv6() { 4 } else { 1 };
    let pairs = words(left).into_iter().zip(words(right)).take(length);
    pairs.map(|(left, right)| wrapping(left, right)).find(|order| order.is_ne()).unwrap_or(Ordering::Equal)
}

/// The sign of the difference modulo 2^32.
fn wrapping(left: u32, right: u32) -> Ordering {
    left.wrapping_sub(right).cast_signed().cmp(&0)
}
