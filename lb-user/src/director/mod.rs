//! The director: virtual services, their real servers, and IPVS's rules about them.

pub mod model;
